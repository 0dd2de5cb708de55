"""Python values between two processes of which one is not trusted: plain ones, as JSON with their types.

No pickle: what comes back builds numbers, strings and containers and calls nothing. A value of a class of
the program's own arrives as its plain base (an OrderedDict as a dict, a named tuple as a tuple), or as an
`Opaque`, which equals nothing: a program cannot send an object that claims to equal the right answer.
"""

from __future__ import annotations

import collections.abc
import itertools
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_MOST_ITEMS = 100_000
"""Taken from an iterator, which may be endless."""


class Opaque:
    """Stands for a value that cannot travel; equal to nothing."""

    def __init__(self, kind: str) -> None:
        """Keep the name of its class."""
        self._kind = kind

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._kind}>"


def encode(value: Any) -> Any:
    """Return a value as JSON has it: null, booleans and strings as they are, all else as [kind, content].

    Raises:
        RecursionError: it holds itself, or is nested too deeply.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    for classes, kind, content in _ENCODERS:
        if isinstance(value, classes):
            return [kind, content(value)]
    return ["opaque", type(value).__name__]


def decode(sent: Any) -> Any:
    """Return the value again.

    Raises:
        ValueError, TypeError, KeyError: nothing that `encode` wrote.
        RecursionError: nested too deeply.
    """
    if sent is None or isinstance(sent, bool | str):
        return sent
    kind, content = sent
    return _DECODERS[kind](content)


def _items(value: Iterable[Any]) -> list[Any]:
    return [encode(item) for item in itertools.islice(value, _MOST_ITEMS)]


def _values(content: Iterable[Any]) -> list[Any]:
    return [decode(item) for item in content]


def _of(kind: Any) -> Callable[[Any], list[Any]]:
    """Return what encodes a container by its own class's iterator, whatever a subclass says."""
    return lambda value: [encode(item) for item in kind.__iter__(value)]


_ENCODERS: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (int, "int", lambda value: format(int.__index__(value), "x")),
    (float, "float", float.hex),
    (complex, "complex", lambda value: [float.hex(value.real), float.hex(value.imag)]),
    (Fraction, "fraction", str),
    (Decimal, "decimal", str),
    (bytes, "bytes", bytes.hex),
    (dict, "dict", lambda value: [[encode(key), encode(item)] for key, item in dict.items(value)]),
    (list, "list", _of(list)),
    (tuple, "tuple", _of(tuple)),
    (set, "set", _of(set)),
    (frozenset, "frozenset", _of(frozenset)),
    (collections.abc.KeysView, "set", _items),
    (range, "range", lambda value: [value.start, value.stop, value.step]),
    ((collections.abc.Iterator, collections.abc.ValuesView, collections.abc.ItemsView), "iterator", _items),
)

_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "float": float.fromhex,
    "complex": lambda content: complex(*map(float.fromhex, content)),
    "fraction": Fraction,
    "decimal": Decimal,
    "bytes": bytes.fromhex,
    "dict": lambda content: {decode(key): decode(item) for key, item in content},
    "list": _values,
    "tuple": lambda content: tuple(_values(content)),
    "set": lambda content: set(_values(content)),
    "frozenset": lambda content: frozenset(_values(content)),
    "range": lambda content: range(*map(int, content)),
    "iterator": lambda content: iter(_values(content)),
    "opaque": Opaque,
}
