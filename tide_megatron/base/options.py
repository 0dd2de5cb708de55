"""How a recipe's options are declared: once, beside what they tune, with what a reader wants to know of them.

An options class is a frozen, keyword-only pydantic dataclass with `STRICT`; the docstring under a field is
its meaning, and `docs/recipe.md` and `tide recipe` are made of both. Marks stand in a field's annotation:

- `MACHINE`: it chooses machines or reports and never changes the mathematics, so runs that differ in it are
  the same run, and it does not enter the digest that a run folder is compared with on resume;
- `PLACE`: it is a path; what lies there is part of the mathematics, where it lies is not;
- `ADDED`: releases before did not have it, so at its default it does not enter the digest either;
- `Was("x")`: null, which is left to somebody else now, had this value as its default in earlier releases, and
  so it has in the digest: their recipes keep theirs;
- `Paper("0.5")`: what the paper used (arXiv 2604.26951, tables 5 and 6).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from tide_megatron.base.errors import ConfigError
from tide_megatron.base.files import local_path


def _local(word: str) -> str:
    """Return a folder as it is meant (`local_path`), with pydantic's kind of error."""
    try:
        path = local_path(word)
    except ConfigError as fault:
        raise ValueError(str(fault)) from None
    return str(path) if word.startswith("~") else word  # as written else: `./~x` must not become `~x`


Off = BeforeValidator(lambda value: "off" if value is False else value)
"""For choices that have an `off`: YAML reads the bare word as False."""
Folder = Annotated[str, Field(min_length=1), AfterValidator(_local)]
"""A folder; the empty string would silently be the current one, and `~` a folder of that name."""
STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


@dataclasses.dataclass(frozen=True)
class _Mark:
    """What is said of a field."""

    word: str


MACHINE, PLACE, ADDED = _Mark("machine"), _Mark("place"), _Mark("added")


@dataclasses.dataclass(frozen=True)
class Paper:
    """What the paper used."""

    value: str


@dataclasses.dataclass(frozen=True)
class Was:
    """What null stands for in the digest."""

    value: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One field of an options class."""

    owner: type[Any]
    name: str
    kind: Any
    """Its type without annotations."""
    default: Any
    """`dataclasses.MISSING` where there is none; a factory's value is made."""
    paper: str | None
    is_machine: bool
    is_place: bool
    is_added: bool
    was: str | None = None
    """What null stands for in the digest."""

    @property
    def meaning(self) -> str:
        """The docstring under it, on one line; found in the source only when asked, for that takes long."""
        if self.owner not in _MEANINGS:
            _MEANINGS[self.owner] = _meanings(self.owner)
        return _MEANINGS[self.owner].get(self.name, "")

    @property
    def is_required(self) -> bool:
        """Whether a recipe must set it."""
        return self.default is dataclasses.MISSING

    @property
    def nested(self) -> type[Any] | None:
        """The options class it holds, alone or by name, if any."""
        for part in (self.kind, *get_args(self.kind)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                return part
        return None

    @property
    def is_named(self) -> bool:
        """Whether it maps names to what it holds."""
        return get_origin(self.kind) is dict


def options_of(kind: type[Any]) -> Sequence[Option]:
    """Return the fields of an options class, inherited ones first, in order of declaration."""
    if kind not in _KNOWN:
        _KNOWN[kind] = tuple(_options_of(kind))
    return _KNOWN[kind]


_KNOWN: dict[type[Any], Sequence[Option]] = {}


def _options_of(kind: type[Any]) -> Iterator[Option]:
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = _unwrapped(hints[field.name])
        yield Option(
            owner=kind,
            name=field.name,
            kind=hint,
            default=_default(field),
            paper=next((mark.value for mark in marks if isinstance(mark, Paper)), None),
            is_machine=MACHINE in marks,
            is_place=PLACE in marks,
            is_added=ADDED in marks,
            was=next((mark.value for mark in marks if isinstance(mark, Was)), None),
        )


def without_machine(tree: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return a tree of plain values without what is marked as no mathematics, or as added and at its default.

    Args:
        tree: values by field, nested; keys that the class does not have stay.
        kind: the options class that it describes.

    Raises:
        KeyError: a value without a default is missing.
        TypeError: a section is no mapping.
    """
    _check_whole(tree, kind)
    return _without(
        tree, kind, lambda option, value: option.is_machine or (option.is_added and value == option.default)
    )


def without_places(tree: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return a tree of plain values, or a part of one, without its paths."""
    return _without(tree, kind, lambda option, _: option.is_place)


def places(tree: Mapping[str, Any], kind: type[Any], prefix: str = "") -> dict[str, Any]:
    """Return the paths that are no machine choice in a tree of plain values, by dotted key."""
    found: dict[str, Any] = {}
    for option in options_of(kind):
        value, key = tree.get(option.name), f"{prefix}{option.name}"
        if option.is_place and not option.is_machine:
            found[key] = value
        elif option.nested is not None and value is not None:
            for name, part in _parts(value, option).items():
                found |= places(part, option.nested, f"{key}.{name}." if name else f"{key}.")
    return found


Drops = Callable[[Option, Any], bool]
"""Whether a value goes."""


def _check_whole(tree: Mapping[str, Any], kind: type[Any]) -> None:
    """Raise a KeyError for a required value that is missing, a TypeError for a section that is none."""
    for option in options_of(kind):
        if option.is_required and option.name not in tree:
            raise KeyError(option.name)
        if option.nested is not None and tree.get(option.name) is not None:
            for part in _parts(tree[option.name], option).values():
                _check_whole(part, option.nested)


def _without(tree: Mapping[str, Any], kind: type[Any], drops: Drops) -> dict[str, Any]:
    known = {option.name: option for option in options_of(kind)}
    return {
        key: value if key not in known else _inside(value, known[key], drops)
        for key, value in tree.items()
        if key not in known or not drops(known[key], value)
    }


def _inside(value: Any, option: Option, drops: Drops) -> Any:
    """Do the same to what an option holds."""
    if option.nested is None or value is None:
        return option.was if value is None else value
    parts = {name: _without(part, option.nested, drops) for name, part in _parts(value, option).items()}
    return parts if option.is_named else parts[""]


def _parts(value: Any, option: Option) -> Mapping[str, Any]:
    """Return the sections that an option holds by name; a single one under the empty name."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{option.name} is a section, not {value!r}")
    return value if option.is_named else {"": value}


def described(kind: Any) -> str:
    """Write a type as a recipe's reader wants it: choices, numbers, `null` for None."""
    kind, _ = _unwrapped(kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is tuple:
        inner = [described(part) for part in parts if part is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in parts else f"[{', '.join(inner)}]"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "by name" if origin is dict else "section"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}
    return names[kind]


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default; pydantic keeps that of its own `Field` inside it."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    default = field.default
    if isinstance(default, FieldInfo):
        return (
            dataclasses.MISSING if default.is_required() else default.get_default(call_default_factory=True)
        )
    return default


def _unwrapped(hint: Any) -> tuple[Any, list[Any]]:
    """Return a type without its annotations, and all of these."""
    marks: list[Any] = []
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        marks += more
    return hint, marks


_MEANINGS: dict[type[Any], dict[str, str]] = {}


def _meanings(kind: type[Any]) -> dict[str, str]:
    """Return the docstring under each field, those of base classes included."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(tree, ast.ClassDef), f"{part} is a class"
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = text.value if isinstance(text, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[field.target.id] = " ".join(inspect.cleandoc(value.value).split())
    return found
