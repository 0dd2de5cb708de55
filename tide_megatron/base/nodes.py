"""SLURM's short forms as text: lists of nodes, counts of tasks, spans of time.

`scontrol show hostnames` does it too, but containers seldom have it, and that of 22.05 takes `n[` for a node.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from tide_megatron.base.errors import ConfigError

MOST_NODES = 65_536
"""A list may name so many; more is a slip of the pen."""
_ITEM = re.compile(r"(?:[\w.-]|\[[^\[\]]*\])+", re.ASCII)
_PART = re.compile(r"\[([^\[\]]*)\]|([\w.-]+)", re.ASCII)
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


def expand_nodes(text: str, said_by: str) -> list[str]:
    """Return the names of a list of nodes: "gpu-[07-09,12].site,login" are five.

    Where a name has several brackets, the last one counts fastest, as `scontrol show hostnames` does.

    Args:
        text: the list.
        said_by: what it comes from, for the error.

    Raises:
        ConfigError: it is no such list; what is wrong is said.
    """
    names: list[str] = []
    position = 0
    try:
        while True:
            item = _ITEM.match(text, position)
            if item is None:
                rest = text[position:]
                raise ValueError(f"no node's name stands at {rest!r}" if rest else "it ends without a name")
            names += _expanded(item[0])
            position = item.end()
            if len(names) > MOST_NODES:
                raise ValueError(f"it names more than {MOST_NODES} nodes")
            if position == len(text):
                return names
            if text[position] != ",":
                raise ValueError(f"{text[position:]!r} cannot follow {item[0]!r}")
            position += 1
    except ValueError as fault:
        raise ConfigError(
            f"{said_by}={text!r} is no list of nodes ({fault}); write one such as n[001-004,7],m3, or name "
            "the machine of rank 0 in MASTER_ADDR"
        ) from None


def _expanded(item: str) -> Iterator[str]:
    """Yield the names that one item of a list stands for."""
    parts = [[word] if word else _numbers(inside) for inside, word in _PART.findall(item)]
    count = 1
    for part in parts:
        count *= len(part)
    if count > MOST_NODES:
        raise ValueError(f"{item!r} names more than {MOST_NODES} nodes")
    return map("".join, itertools.product(*parts))


def _numbers(inside: str) -> list[str]:
    """Write out what stands in brackets, "001-003,7", with as many digits as each has."""
    found: list[str] = []
    for part in inside.split(","):
        ends = _RANGE.fullmatch(part)
        if ends is None:
            raise ValueError(f"[{inside}] holds {part!r}, which is neither a number nor a range")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise ValueError(f"the range {part} runs backwards")
        if last - first >= MOST_NODES:
            raise ValueError(f"the range {part} holds more than {MOST_NODES} nodes")
        found += [f"{number:0{len(ends[1])}}" for number in range(first, last + 1)]
    return found


def tasks_by_node(text: str) -> list[int]:
    """Read SLURM's short form, "4(x2),3" for [4, 4, 3]; empty for anything else."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))] if all(parts) else []


def seconds_of(text: str) -> float | None:
    """Read a span of time as SLURM writes it, "1-02:03:04", "2:03:04", "3:04"; None for any other word."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip(), re.ASCII)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((24 * days + hours) * 60 + minutes) * 60 + seconds)
