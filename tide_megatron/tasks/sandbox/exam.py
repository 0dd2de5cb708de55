"""A test that a program cannot cheat: the two run in different processes.

What judges never shares memory, files or pipes with what is judged. A test runs in a process of its own,
where the names it tests stand for calls into the program's process; only arguments and plain values travel
(`inside.values`). So a program that leaves early, patches builtins, walks frames, writes to every pipe it has
or overloads `==` can change what it returns, and nothing else; and it never sees what it is compared with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from tide_megatron.tasks.sandbox.inside.session import packed
from tide_megatron.tasks.sandbox.process import Confined, Ended
from tide_megatron.tasks.sandbox.sandbox import Sandbox


@dataclasses.dataclass(frozen=True)
class Printed:
    """What a line did."""

    output: str
    raised: str | None
    """The last line of its exception."""


def examine(sandbox: Sandbox, program: str, *, setting: str, test: str, names: Sequence[str]) -> str | None:
    """Say whether a program passes a test.

    Args:
        sandbox: where both run.
        program: defines the names.
        setting: source that the test needs, trusted; runs beside the test, and not beside the program.
        test: trusted; passes where it raises nothing.
        names: of the program's functions, which the test calls.

    Returns:
        None where it passes, else why not in a few words.

    Raises:
        SandboxError: the sandbox does not start; says nothing of the program.
    """
    with sandbox.open() as candidate:
        try:
            fault = candidate.ask({"run": program}).get("error")
            if fault:
                return _line(fault)
            with sandbox.open() as examiner:
                examiner.ask({"run": setting})
                return _converse(examiner, candidate, {"run": test, "remote": [*names]})
        except Ended as end:
            return str(end)


def replay(
    sandbox: Sandbox, program: str, lines: Sequence[str], *, module: str, name: str
) -> list[Printed] | str:
    """Run a program in place of a function of an installed module, and then lines as at a prompt.

    Args:
        sandbox: where all run, in one process.
        program: defines the function; runs with the names of the module, without the function's own.
        lines: whole statements, each of which may print; they run in the module, too.
        module: of the standard library.
        name: of the function.

    Returns:
        What each line printed or raised; or, in a few words, why the program does not run or did not come
        to the end of the lines.

    Raises:
        SandboxError: the sandbox does not start; says nothing of the program.
    """
    printed: list[Printed] = []
    with sandbox.open() as candidate:
        try:
            fault = candidate.ask({"run": program, "module": module, "without": [name]}).get("error")
            if fault:
                return _line(fault)
            for line in lines:
                answer = candidate.ask({"run": line, "single": True})
                fault = answer.get("error")
                printed.append(Printed(str(answer.get("output")), _line(fault) if fault else None))
        except Ended as end:
            return str(end)
    return printed


def _converse(examiner: Confined, candidate: Confined, request: dict[str, object]) -> str | None:
    """Carry calls and their answers between the two until the test has ended."""
    sent = packed(request)[4:]
    while True:
        said = examiner.relay(sent)
        answer = json.loads(said)
        if "call" not in answer:
            return _line(answer["error"]) if answer["error"] else None
        sent = candidate.relay(said)


def _line(fault: object) -> str:
    """Return an exception's last line; a program may have made it up, and anything else in its place."""
    line = fault[2] if isinstance(fault, list) and len(fault) == 3 else fault
    return str(line)[:300]
