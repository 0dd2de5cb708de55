"""Numbers with their units, for people."""

from __future__ import annotations

import re

from tide_megatron.base.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}


def in_bytes(number: float) -> str:
    """Write a number of bytes with a decimal unit and three digits: 1.27 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def read_bytes(text: str, key: str) -> int:
    """Read a number of bytes with a decimal unit: 5GB, 500 MB, 1.5kB.

    Args:
        text: what the user wrote.
        key: the option, for the message.

    Raises:
        ConfigError: not a size of at least one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?b|)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    number = round(float(match[1]) * unit) if match and unit else 0
    if number < 1:
        raise ConfigError(f"{key}: {text!r} is no size; write a number with B, kB, MB, GB or TB, as in 5GB")
    return number
