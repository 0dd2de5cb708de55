"""Numbers with their units, and moments, for people."""

from __future__ import annotations

import datetime

from pydantic import ByteSize, TypeAdapter, ValidationError

from tide_megatron.base.errors import ConfigError


def in_bytes(number: float) -> str:
    """Write a number of bytes with a decimal unit and three digits: 1.27 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def in_time(seconds: float | None) -> str:
    """Write a duration in words of its size."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return (
        f"{whole // 60} min"
        if whole < 7200
        else str(datetime.timedelta(seconds=whole)).rpartition(":")[0] + " h"
    )


def now() -> str:
    """Write this moment to the second, ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read_bytes(text: str, key: str) -> int:
    """Read a number of bytes with its unit: 5GB, 500 MB, 1.5kB, 4GiB.

    Args:
        text: what the user wrote.
        key: the option, for the message.

    Raises:
        ConfigError: not a size of at least one byte.
    """
    try:
        number = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        number = 0
    if number < 1:
        raise ConfigError(f"{key}: {text!r} is no size; write a number with B, kB, MB, GB or TB, as in 5GB")
    return number
