"""A confined process seen from outside: a request, its answer, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tide_megatron.tasks.sandbox.errors import SandboxError
from tide_megatron.tasks.sandbox.inside.session import packed

_START_SECONDS, _END_SECONDS = 120.0, 5.0
_LONGEST_ANSWER = 1 << 20
_CHUNK = 1 << 16


class Ended(Exception):
    """The program gave no answer; the message says why in a few words."""


class Confined:
    """One process and the pipes to it. Leaving it as a context kills it and all that it started."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        nowhere: int,
        cpu_seconds: int,
        wall_seconds: float,
        is_watched: bool,
    ) -> None:
        """Start a process and wait until it is confined and ready.

        Args:
            command: program and arguments; it inherits nothing else.
            nowhere: /dev/null, open to read and write, inherited under its number.
            cpu_seconds: its limit, for messages.
            wall_seconds: from when it is ready until its last answer.
            is_watched: the process started watches over the one that runs programs, ends it and all that is
                left of it when asked to (SIGTERM), and ends behind it.

        Raises:
            SandboxError: it does not start, or cannot be confined.
        """
        self._cpu_seconds, self._is_watched = cpu_seconds, is_watched
        self._allowed_seconds = _START_SECONDS
        self._held = b""
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env={}, cwd="/",
                pass_fds=(nowhere,), start_new_session=True,
            )  # fmt: skip
        except OSError as fault:
            raise SandboxError(f"{command[0]} does not start: {fault.strerror or fault}") from None
        self._to, self._from, self._errors = self._pipes()
        os.set_blocking(self._to, False)
        try:
            self._deadline = time.monotonic() + self._allowed_seconds
            self._exchange(b"")
        except Ended as fault:
            self._kill()
            with open(self._errors, "rb", closefd=False) as errors:
                lines = errors.read().decode(errors="replace").strip().splitlines()
            self._close()
            raise SandboxError(lines[-1] if lines else f"it does not get ready: {fault}") from None
        self._allowed_seconds = wall_seconds
        self._deadline = time.monotonic() + wall_seconds

    def __enter__(self) -> Confined:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()
        self._close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer (`inside.session`), which the program may have made up.

        Raises:
            Ended: there is none.
        """
        try:
            answer = json.loads(self.relay(packed(request)[4:]))
        except (ValueError, RecursionError):
            raise Ended("an answer that is none") from None
        if not isinstance(answer, dict):
            raise Ended("an answer that is none")
        return answer

    def relay(self, request: bytes) -> bytes:
        """Send a request as it travels and return the answer likewise, unread.

        Raises:
            Ended: there is none.
        """
        return self._exchange(len(request).to_bytes(4, "big") + request)

    def _exchange(self, request: bytes) -> bytes:
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        if request:
            poll.register(self._to, select.POLLOUT)
        while (answer := self._take()) is None:
            left = self._deadline - time.monotonic()
            ready = dict(poll.poll(max(0.0, left) * 1000)) if left > 0 else {}
            if not ready:
                raise Ended(f"{self._allowed_seconds:g} s of time")
            if self._to in ready:
                request = self._send(request)
                if not request:
                    poll.unregister(self._to)
            if self._from in ready:
                chunk = os.read(self._from, _CHUNK)
                if not chunk:
                    raise Ended(self._how_it_ended())
                self._held += chunk
        return answer

    def _send(self, request: bytes) -> bytes:
        """Write what fits and return what is left; a process that does not read any more has ended."""
        try:
            return request[os.write(self._to, request) :]
        except BlockingIOError:
            return request
        except BrokenPipeError:
            return b""

    def _take(self) -> bytes | None:
        """Return a whole answer out of what was read; None where more must come."""
        if len(self._held) < 4:
            return None
        size = int.from_bytes(self._held[:4], "big")
        if size > _LONGEST_ANSWER:
            raise Ended(f"an answer of more than {_LONGEST_ANSWER >> 20} MiB")
        if len(self._held) < 4 + size:
            return None
        answer, self._held = self._held[4 : 4 + size], self._held[4 + size :]
        return answer

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        number = -code if code < 0 else code - 128
        if number == signal.SIGXCPU:
            return f"{self._cpu_seconds} s of processor time"
        if number > 0:
            names = {one.value: one.name for one in signal.Signals}
            return f"killed by {names.get(number, f'signal {number}')}"
        return f"exit code {code} without an answer"

    def _kill(self) -> None:
        """End it and what it started, and wait for that."""
        if self._is_watched and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        if not self._is_watched or self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _pipes(self) -> list[int]:
        """Return the process's pipes: to it, from it, and of its errors."""
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        return [pipe.fileno() for pipe in pipes if pipe is not None]
