"""The conversation of a confined process: it runs source, calls functions, and answers; nothing else.

Messages are JSON behind four bytes of length, requests on one pipe and answers on another. Requests:

- {"run": source, "single": bool, "module": name or null, "without": [name, ...]}: run source in the
  session's namespace (`single`: as at an interactive prompt, where values are printed). Where a module of the
  standard library is named, its namespace is the session's from now on, and the names are taken out first.
  Answer: {"output", "error"}, the error null or [class, message, its last line as Python prints it].
- {"call": name, "args", "kwargs"}: call what the session knows by that name. Answer: {"value"} or {"error"}.
- {"run": source, "remote": [name, ...]}: these names are functions of another process. While such a source
  runs, calls go out as requests of the second kind, and their answers come in. That is how a test calls a
  program without sharing a process with it.

Nothing here is secret: a program may take over its own process and answer what it likes, and is then a
program that gives these answers. What it is compared with lies in another process.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import io
import json
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from tide_megatron.tasks.sandbox.inside.values import decode, encode

Message = dict[str, Any]


class _Printed(io.StringIO):
    """What a program prints, up to a limit."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def write(self, text: str) -> int:
        """Keep it.

        Raises:
            OSError: that is more than is kept.
        """
        self._left -= len(text)
        if self._left < 0:
            raise OSError("more output than is kept")
        return super().write(text)


def read_message(source: BinaryIO) -> Message | None:
    """Return the next message; None where no more come."""
    head = source.read(4)
    if len(head) < 4:
        return None
    message: Message = json.loads(source.read(int.from_bytes(head, "big")))
    return message


def packed(message: Message) -> bytes:
    """Return a message as it travels."""
    content = json.dumps(message).encode()
    return len(content).to_bytes(4, "big") + content


class Session:
    """One namespace and what happens in it."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO, most_output: int) -> None:
        """Take the two pipes.

        Args:
            requests: to read.
            answers: to write.
            most_output: characters of output that are kept of one run.
        """
        self._requests, self._answers, self._most_output = requests, answers, most_output
        self._names: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}

    def serve(self) -> None:
        """Answer requests until no more come."""
        random.seed(0)
        self._send({"ready": True})
        while (request := read_message(self._requests)) is not None:
            self._send(self._run(request) if "run" in request else self._call(request))

    def _send(self, message: Message) -> None:
        self._answers.write(packed(message))
        self._answers.flush()

    def _run(self, request: Message) -> Message:
        printed, error = _Printed(self._most_output), None
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                names = self._namespace(request.get("module"), request.get("without", ()))
                names |= {name: self._remote(name) for name in request.get("remote", ())}
                mode = "single" if request.get("single") else "exec"
                sys.displayhook = sys.__displayhook__
                # Under no flags of this file's own: `from __future__ import annotations` is one.
                code = compile(request["run"], "<program>", mode, dont_inherit=True)
                exec(code, names)
            except BaseException as fault:
                error = _told(fault)
        return {"output": printed.getvalue(), "error": error}

    def _namespace(self, module: str | None, without: Sequence[str]) -> dict[str, Any]:
        if module is not None:
            self._names = vars(importlib.import_module(module))
            root = module.partition(".")[0]  # examples may call it by its whole name
            self._names.setdefault(root, sys.modules[root])
            for name in without:
                self._names.pop(name, None)
        return self._names

    def _call(self, request: Message) -> Message:
        try:
            with contextlib.redirect_stdout(_Printed(self._most_output)):
                args, kwargs = decode(request["args"]), decode(request["kwargs"])
                if request["call"] not in self._names:
                    raise NameError(f"name {request['call']!r} is not defined")
                return {"value": encode(self._names[request["call"]](*args, **kwargs))}
        except BaseException as fault:
            return {"error": _told(fault)}

    def _remote(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._send({"call": name, "args": encode(args), "kwargs": encode(kwargs)})
            answer = read_message(self._requests)
            if answer is None:
                raise SystemExit("nobody answers")
            if "error" in answer:
                raise _rebuilt(answer["error"])
            return decode(answer["value"])

        return call


def _told(fault: BaseException) -> list[str]:
    """Return an exception's class, message and line; one that cannot be told has its class alone."""
    try:
        line = traceback.format_exception_only(type(fault), fault)[-1].strip()
        return [type(fault).__name__, str(fault)[:2000], line[:2000]]
    except BaseException:
        return [type(fault).__name__, "", type(fault).__name__]


def _rebuilt(told: Sequence[str]) -> Exception:
    """Return an exception of the same name where Python has one; a RuntimeError with its line else."""
    kind = getattr(builtins, told[0], None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
        with contextlib.suppress(Exception):
            return kind(told[1])
    return RuntimeError(told[2])
