"""Small wrong programs: every way to turn one operator or constant of a file into a neighbouring one.

The syntax tree says what is code, so docstrings, messages, annotations and `__repr__` are left alone. Which
mutations are picked follows from the seed and from each mutation's own text, so an edit elsewhere in a file
does not change the pick. A mutation that changes nothing that anybody could see is *equivalent*: it is named
in `mutations.yaml` with the reason, and another one is picked in its place.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import fnmatch
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).with_name("mutations.yaml")

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
DROPPED = (ast.USub, ast.Invert, ast.Not)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change of one file."""

    file: str
    line: int
    place: str
    """Dotted name of the function or class, empty at the top of the module."""
    original: str
    """The smallest expression that shows the change."""
    replaced: str
    nth: int
    """Which of several equal changes in the same place, from 0."""
    text: str
    """The whole mutated file."""

    @property
    def key(self) -> str:
        """Name the change by what it does and where, without its line."""
        mark = f" ({self.nth + 1})" if self.nth else ""
        return f"{self.file}:{self.place}: {self.original} -> {self.replaced}{mark}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to mutate and which tests must notice; read from `mutations.yaml`."""

    folders: tuple[str, ...]
    tests: dict[str, list[str]]
    """File or folder -> tests to run, the likeliest first; the longest match counts."""
    equivalent: dict[str, str]
    """Pattern of keys -> why nobody could tell."""

    @classmethod
    def read(cls) -> Plan:
        """Read the data file."""
        return cls(**yaml.safe_load(DATA.read_text(encoding="utf-8")))

    def tests_of(self, file: str) -> list[str]:
        """Return the tests for a mutated file."""
        return self.tests[max((name for name in self.tests if file.startswith(name)), key=len)]


def all_mutations(root: Path, folders: Sequence[str]) -> list[Mutation]:
    """List every mutation of the Python files in some folders."""
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return [
        mutation
        for path in files
        for mutation in mutations_of(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
    ]


def pick(mutations: Sequence[Mutation], number: int, seed: int, equivalent: Iterable[str]) -> list[Mutation]:
    """Pick some mutations by seed, leaving out those that match a pattern of equivalent ones."""
    patterns = list(equivalent)
    candidates = [m for m in mutations if not any(fnmatch.fnmatchcase(m.key, p) for p in patterns)]
    return sorted(candidates, key=lambda m: hashlib.sha256(f"{seed}:{m.key}".encode()).digest())[:number]


def mutations_of(file: str, source: str) -> Iterator[Mutation]:
    """Yield every mutation of one file."""
    tree = ast.parse(source)
    seen: Counter[str] = Counter()
    for place, node, shown in _code(tree):
        for change in _changes(node):
            original = ast.unparse(shown)
            undo = _set(node, change)
            replaced, text = ast.unparse(shown), ast.unparse(tree)
            _set(node, undo)
            name = f"{place}: {original} -> {replaced}"
            yield Mutation(
                file=file,
                line=node.lineno,
                place=place,
                original=original,
                replaced=replaced,
                nth=seen[name],
                text=text,
            )
            seen[name] += 1


def _code(
    node: ast.AST, place: str = "", around: ast.AST | None = None
) -> Iterator[tuple[str, ast.expr, ast.AST]]:
    """Yield all expressions that run, leaving out what only speaks to people or type checkers.

    Each comes as (place, expression, what to show of it): a constant says nothing without what is around it.
    """
    if isinstance(node, ast.JoinedStr | ast.Raise):
        return
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if node.name == "__repr__":
            return
        place = f"{place}.{node.name}" if place else node.name
    if isinstance(node, ast.expr):
        is_bare = isinstance(node, ast.Constant) or _is_negative_constant(node)
        yield place, node, around if is_bare and around else node
    if isinstance(node, ast.expr | ast.Assign | ast.AnnAssign | ast.arguments):
        around = node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or (isinstance(node, ast.Assert) and field == "msg"):
            continue
        if _is_negative_constant(node):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _code(child, place, around)


def _is_negative_constant(node: ast.AST) -> bool:
    """Say whether this is one number for a reader though two nodes for the parser, such as -1."""
    return (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
    )


Change = tuple[str, Any]


def _set(node: ast.AST, change: Change) -> Change:
    """Replace one field of a node, or its whole content for field "*"; return what undoes it."""
    field, value = change
    if field == "*":
        undo: Change = ("*", (type(node), dict(vars(node))))
        node.__class__, fields = value
        vars(node).clear()
        vars(node).update(fields)
        return undo
    before = getattr(node, field)
    setattr(node, field, value)
    return field, before


def _changes(node: ast.expr) -> Iterator[Change]:
    """Yield the changes of one expression itself, not of its parts."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield "op", SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            yield "ops", [*node.ops[:index], SWAPS[type(operator)](), *node.ops[index + 1 :]]
    elif _is_negative_constant(node):
        yield from (_content(node, value) for value in _neighbours(-node.operand.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, DROPPED):
        operand = copy.deepcopy(node.operand)
        yield "*", (type(operand), dict(vars(operand)))
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield from (_content(node, value) for value in _neighbours(node.value))


def _neighbours(value: float) -> list[float]:
    """Return the constants that a slip of the pen would make of one: 0 for 1, one off, twice, no sign."""
    if value in (0, 1):
        return [type(value)(1 - value)]
    off = value + 1 if isinstance(value, int) else 2 * value
    return [off, -value] if value < 0 else [off]


def _content(node: ast.expr, value: Any) -> Change:
    """Return the change of a whole node into a constant."""
    return "*", (ast.Constant, vars(ast.copy_location(ast.Constant(value), node)))
