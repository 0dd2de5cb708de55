"""What ranks found before the first step: as values, as tables for the log, as preflight.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tide_megatron.base.files import write_text
from tide_megatron.base.units import in_bytes, now
from tide_megatron.parallel.link_speed import MEASURES, ClockOffset, GroupTimes
from tide_megatron.train.folder import PREFLIGHT
from tide_megatron.train.placement import drawn
from tide_megatron.train.rank_differences import by_machine, ranks_in_short
from tide_megatron.train.rank_facts import RankFacts

_MOST_HOSTS = 64
"""So many are drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared; the same on every rank."""

    facts: Sequence[RankFacts]
    """Of each rank."""
    contents: Mapping[str, str]
    """What all ranks have alike: key -> digest."""
    checkpoint_bytes: int | None
    """Of one checkpoint, as predicted; None: config.json does not say."""
    clocks: Mapping[int, ClockOffset]
    """Of the first rank of every machine but rank 0's."""
    warnings: Sequence[str]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was compared and measured; the same on every rank."""

    comparison: Comparison
    shards: Mapping[str, Sequence[tuple[str, Sequence[int]]]]
    """Model -> its parts, each with the ranks that hold it."""
    groups: Sequence[GroupTimes]
    neighbours: Sequence[float]
    """Seconds of each rank; empty: not measured."""
    warnings: Sequence[str]
    """Of both parts."""
    seconds: float
    """Of both parts."""


def told(found: Preflight) -> str:
    """Return all tables as plain text."""
    tables = [_alike(found), _hosts(found), *([_groups(found)] if found.groups else [])]
    warnings = f"{len(found.warnings) or 'no'} warning{'s' * (len(found.warnings) != 1)}"
    last = f"preflight: {found.seconds:.2f} s, {warnings}"
    return "\n".join([*(drawn(table) for table in tables), last])


def _alike(found: Preflight) -> Table:
    """List what all ranks have alike."""
    comparison = found.comparison
    first = comparison.facts[0]
    table = Table("alike on all ranks", "", box=None, title="preflight", title_justify="left")
    table.add_row("recipe", first.recipe)
    for key, digest in comparison.contents.items():
        table.add_row(key, digest)
    table.add_row("versions", ", ".join(f"{name} {value}" for name, value in first.versions.items()))
    for key, parts in found.shards.items():
        copies = [len(ranks) for _, ranks in parts]
        least, most = min(copies), max(copies)
        times = f"{least}" if least == most else f"{least} to {most}"
        table.add_row(f"{key} in memory", f"{len(parts)} part(s), {times} equal rank(s) each")
    return table


def _hosts(found: Preflight) -> Table:
    """List the machines."""
    comparison = found.comparison
    needed = comparison.checkpoint_bytes
    checkpoint = "" if needed is None else f" (a checkpoint: {in_bytes(needed)})"
    table = Table("host", "ranks", "device", f"free disk{checkpoint}", "clock", "to the next rank", box=None)
    machines = by_machine(comparison.facts)
    for ranks in machines[:_MOST_HOSTS]:
        one = comparison.facts[ranks[0]]
        table.add_row(
            one.host,
            ranks_in_short(ranks),
            one.device,
            "?" if one.free_bytes is None else in_bytes(one.free_bytes),
            _clock(comparison, ranks[0]),
            _neighbours(found, ranks),
        )
    if len(machines) > _MOST_HOSTS:
        table.add_row(f"{len(machines) - _MOST_HOSTS} more")
    return table


def _clock(comparison: Comparison, rank: int) -> str:
    """Write how a machine's clock stands to rank 0's."""
    clock = comparison.clocks.get(rank)
    if clock is None:
        return "rank 0's"
    return f"{clock.seconds:+.4f} s (within {1e3 * clock.within:.2g} ms)"


def _neighbours(found: Preflight, ranks: Sequence[int]) -> str:
    """Write at what rate the slowest rank of a machine gave to the next one and took from the last."""
    if not found.neighbours:
        return ""
    slowest = max(found.neighbours[rank] for rank in ranks)
    return f"{in_bytes(found.groups[0].bytes / slowest)}/s"


def _groups(found: Preflight) -> Table:
    """List the kinds of groups, each by its slowest group."""
    size = in_bytes(found.groups[0].bytes)
    table = Table(
        "groups", "number", "all-reduce of 4 B", f"of {size}", "all-to-all of 4 B", f"of {size}", box=None
    )
    for times in found.groups:
        lists = times.kind.lists
        sizes = sorted({len(ranks) for ranks in lists})
        table.add_row(
            ", ".join(times.kind.names),
            f"{len(lists)} of {'/'.join(map(str, sizes))}",
            *_cells(times),
        )
    return table


def _cells(times: GroupTimes) -> Iterator[str]:
    """Write latency and rate of the slowest group."""
    for measure in MEASURES:
        seconds = times.seconds[measure]
        if measure.endswith("latency"):
            yield f"{1e3 * max(seconds):.3g} ms"
        else:
            yield f"{in_bytes(min(times.rate(measure, group) for group in range(len(seconds))))}/s"


def write_preflight(folder: Path, found: Preflight) -> None:
    """Write preflight.json into a claimed run folder, in one rename (only rank 0 calls it)."""
    write_text(folder / PREFLIGHT, json.dumps(as_json(found), indent=1) + "\n", is_durable=False)


def as_json(found: Preflight) -> dict[str, Any]:
    """Return everything as plain values, for programs."""
    comparison = found.comparison
    first = comparison.facts[0]
    return {
        "at": now(),
        "ranks": len(comparison.facts),
        "seconds": found.seconds,
        "warnings": list(found.warnings),
        "recipe": first.recipe,
        "contents": dict(comparison.contents),
        "versions": dict(first.versions),
        "checkpoint_bytes": comparison.checkpoint_bytes,
        "hosts": [
            {
                "host": comparison.facts[ranks[0]].host,
                "ranks": ranks,
                "device": comparison.facts[ranks[0]].device,
                "free_bytes": comparison.facts[ranks[0]].free_bytes,
                "clock": _clock_values(comparison, ranks[0]),
            }
            for ranks in by_machine(comparison.facts)
        ],
        "shards": {
            key: [{"part": part, "ranks": list(ranks)} for part, ranks in parts]
            for key, parts in found.shards.items()
        },
        "groups": [
            {
                "names": list(times.kind.names),
                "bytes": times.bytes,
                "groups": [list(ranks) for ranks in times.kind.lists],
                "seconds": {measure: list(seconds) for measure, seconds in times.seconds.items()},
            }
            for times in found.groups
        ],
        "neighbour_seconds": list(found.neighbours),
    }


def _clock_values(comparison: Comparison, rank: int) -> dict[str, float]:
    """Return seconds that a machine's clock is ahead of rank 0's, and how well that is known."""
    clock = comparison.clocks.get(rank)
    return (
        {"ahead": 0.0, "within": 0.0} if clock is None else {"ahead": clock.seconds, "within": clock.within}
    )
