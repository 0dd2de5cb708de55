"""Single values of a config.json: checked against the type that their key has, or refused by name."""

from __future__ import annotations

import math
import reprlib
from typing import Any, TypeVar

from tide_megatron.base.errors import ConfigError

Value = TypeVar("Value", int, float, bool, str)

WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
}
"""What messages call a type of JSON."""
_REMEDY = "correct it, or download the file again"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Return a value for a message: one line, and not all of a long one."""
    return _SHORT.repr(value)


def fits(value: Any, kind: type) -> bool:
    """Say whether a parsed value is of a type; a whole number is a number, true and NaN are none."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    return type(value) is kind


def checked(value: Any, kind: type[Value], key: str) -> Value:
    """Return a value of the wanted type.

    Raises:
        ConfigError: it has another one.
    """
    if not fits(value, kind):
        raise ConfigError(f"config.json: {key}: {shown(value)} is not {WORDS[kind]}; {_REMEDY}")
    return kind(value)


def check_one_of(value: Any, kinds: tuple[type, ...], key: str) -> None:
    """Refuse a value of none of the types; null is of every one.

    Raises:
        ConfigError: naming key and value.
    """
    if value is not None and not any(fits(value, kind) for kind in kinds):
        wanted = " or ".join(WORDS[kind] for kind in kinds)
        raise ConfigError(f"config.json: {key}: {shown(value)} is not {wanted}; {_REMEDY}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
