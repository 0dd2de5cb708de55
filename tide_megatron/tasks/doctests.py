"""Functions of the installed standard library to write again, judged by the examples in their docstrings.

Questions come out of the sources of the Python that runs programs: functions of modules, in the order of
their names, whose docstring has examples. A reply runs in the function's own module, in its place, so it may
use what the library's function uses; `doctest`'s rules compare what each example prints. Two forms:

- `doctests`: the question shows the function's head and its whole docstring.
- `doctests_quickstart`: the question is asked as the quickstart's training pairs ask: with the docstring's
  first line, cut at a word. A reply may call its function as it likes. Only functions count that no training
  pair shows: those of files that `examples/quickstart/corpus.py` holds out, and a few written in C, which
  have no source to learn from.

`_LEFT_OUT` names functions whose examples do not judge them: the library's own function fails in the sandbox
(it starts processes or opens sockets, or an example only illustrates), or a function that returns None
passes. Examples are no proof: a reply that prints what they say passes, and so does one that reads the
library's own file, which nothing hides from it.
"""

from __future__ import annotations

import ast
import doctest
import functools
import hashlib
import importlib
import inspect
import os
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tide_megatron.decode.options import Decoding
from tide_megatron.tasks.code import function_of, program_of
from tide_megatron.tasks.program_task import ProgramTask
from tide_megatron.tasks.sandbox.exam import Printed, replay
from tide_megatron.tasks.sandbox.ground import ground_here
from tide_megatron.tasks.sandbox.sandbox import Sandbox
from tide_megatron.tasks.task import Judged, Question

_IN_C = {
    "binascii.b2a_hex": "def b2a_hex(data, sep=None, bytes_per_sep=1):",
    "builtins.bin": "def bin(number):",
    "builtins.hex": "def hex(number):",
    "builtins.oct": "def oct(number):",
    "math.hypot": "def hypot(*coordinates):",
}
"""Functions without source whose docstrings have examples, and their heads."""
_LEFT_OUT = frozenset(
    {
        "antigravity.geohash",  # importing it opens a browser
        "asyncio.timeouts.timeout",
        "asyncio.timeouts.timeout_at",
        "difflib.IS_LINE_JUNK",
        "enum._test_simple_enum",
        "pydoc._start_server",
        "secrets.token_bytes",
        "secrets.token_hex",
        "secrets.token_urlsafe",
        "socket.create_server",
        "subprocess.check_output",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "typing.TypedDict",
        "typing._should_unflatten_callable_args",
    }
)
_ASKED = (
    "Write the function {name} of Python's module {module}, whose other names you may use, so that the "
    "examples come out:\n```python\n{opening}\n```\n"
)
_REQUEST_BYTES = 40
_HELD_OUT_FROM = 900
"""As `examples/quickstart/corpus.py` cuts requests, and splits files on a scale of 1000."""
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function of the library."""

    module: str
    name: str
    head: str
    """Its lines up to the colon; decorators go, as they are no part of what is asked."""
    docstring: str
    source: str
    """All of it, with decorators; empty for one in C."""
    is_held_out: bool
    """Whether no training pair of the quickstart shows it."""

    @property
    def opening(self) -> str:
        """What a model continues: head and docstring."""
        quoted = '"""' + self.docstring.replace("\\", "\\\\").replace('"""', '\\"\\"\\"') + '\n"""'
        return f"{self.head}\n{textwrap.indent(quoted, '    ')}\n"


@dataclass(frozen=True, kw_only=True)
class Doctests(ProgramTask):
    """The standard library's functions; right is one that makes all examples come out."""

    name: str = "doctests"
    is_short: bool = False
    """Whether the question is the docstring's first line, as in the quickstart."""
    only_held_out: bool = False
    """Whether to ask only for functions that no training pair of the quickstart shows."""
    decoding: Decoding = field(default_factory=lambda: Decoding(new_tokens=256))

    def questions(self) -> list[Question]:
        """Return one question a function.

        Raises:
            SandboxError: programs could not be run here.
        """
        ground_here(self.isolation)  # before a model answers for hours
        asked = (one for one in functions_here() if one.is_held_out or not self.only_held_out)
        return [self._question(one) for one in asked if f"{one.module}.{one.name}" not in _LEFT_OUT]

    def _question(self, one: Function) -> Question:
        content = _ASKED.format(name=one.name, module=one.module, opening=one.opening.rstrip())
        if self.is_short:
            content = _request(one.docstring)
        return Question(
            name=f"{one.module}.{one.name}",
            messages=({"role": "user", "content": content},),
            data={
                "module": one.module,
                "name": one.name,
                "opening": one.opening,
                "docstring": one.docstring,
                "held_out": one.is_held_out,
            },
        )

    def program(self, question: Question, reply: str) -> str:
        """Return the program that a reply means."""
        name = question.data["name"]
        return (
            function_of(reply, name) if self.is_short else program_of(reply, question.data["opening"], name)
        )

    def verdict(self, sandbox: Sandbox, question: Question, program: str) -> Judged:
        """Run the program in the function's place, and compare what the examples print."""
        data = question.data
        examples = doctest.DocTestParser().get_examples(data["docstring"])
        lines = [one.source for one in examples]
        told = replay(sandbox, program, lines, module=data["module"], name=data["name"])
        if isinstance(told, str):
            return Judged(score=0.0, why=told)
        faults = (_fault(example, printed) for example, printed in zip(examples, told, strict=True))
        why = next((fault for fault in faults if fault is not None), None)
        return Judged(score=float(why is None), why=why or "passed")


def _fault(example: doctest.Example, printed: Printed) -> str | None:
    """Say what is wrong with what an example printed; None: nothing is."""
    flags = functools.reduce(int.__or__, (flag for flag, is_on in example.options.items() if is_on), 0)
    compare = doctest.OutputChecker().check_output
    if flags & doctest.SKIP:
        return None
    if printed.raised is None:
        is_right = example.exc_msg is None and compare(example.want, printed.output, flags)
    else:
        is_right = example.exc_msg is not None and compare(example.exc_msg, printed.raised + "\n", flags)
    got = printed.raised or printed.output.strip()
    return None if is_right else f"{example.source.strip()[:100]} gives {got[:100]!r}"


@functools.lru_cache(maxsize=1)
def functions_here() -> tuple[Function, ...]:
    """Return all functions of the standard library with examples, `_LEFT_OUT` among them, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [one for file in _files(root) for one in _functions(root, file)]
    found += [_in_c(path, head) for path, head in _IN_C.items()]
    return tuple(sorted(found, key=lambda one: (one.module, one.name)))


def _files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED)
        yield from (Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py"))


def _functions(root: Path, file: str) -> Iterator[Function]:
    """Yield the functions of a file; none of one that this Python cannot read."""
    try:
        text = (root / file).read_text(encoding="utf-8")
        if ">>>" not in text:
            return
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for node in tree.body:
        docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if isinstance(node, ast.FunctionDef) and docstring and _has_examples(docstring):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            yield Function(
                module=file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"),
                name=node.name,
                head="\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]),
                docstring=docstring,
                source="\n".join(lines[first - 1 : node.end_lineno]),
                is_held_out=_is_held_out(file),
            )


def _has_examples(docstring: str) -> bool:
    try:
        return bool(doctest.DocTestParser().get_examples(docstring))
    except ValueError:
        return False


def _is_held_out(file: str) -> bool:
    place = int.from_bytes(hashlib.sha256(f"stdlib/{file}".encode()).digest()[:8], "big") % 1000
    return place >= _HELD_OUT_FROM


def _in_c(path: str, head: str) -> Function:
    module, _, name = path.rpartition(".")
    docstring = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    return Function(module=module, name=name, head=head, docstring=docstring, source="", is_held_out=True)


def _request(docstring: str) -> str:
    """Return a docstring's first line as the quickstart asks with it."""
    request = ""
    for word in docstring.strip().split("\n", 1)[0].split():
        longer = f"{request} {word}".strip()
        if len(longer.encode()) > _REQUEST_BYTES:
            break
        request = longer
    return request
