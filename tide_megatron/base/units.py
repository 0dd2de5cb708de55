"""Numbers with their units, for people."""

from __future__ import annotations


def in_bytes(number: float) -> str:
    """Write a number of bytes with a decimal unit and three digits: 1.27 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
