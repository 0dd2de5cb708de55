"""What differs between ranks, in sentences: which ranks and hosts, both values, what to do.

Arithmetic over what ranks said of themselves (`train/rank_facts.py`) and what was measured, so that a
thousand ranks can be tried without starting one. `train/preflight.py` decides which sentence ends a run.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from tide_megatron.base.errors import some_of
from tide_megatron.base.units import in_bytes
from tide_megatron.parallel.link_speed import ClockOffset, GroupTimes
from tide_megatron.train.rank_facts import CODE, UNREADABLE, Contents, RankFacts
from tide_megatron.train.resolve import Tree, difference

_ONLY_NOTED = ("Python", "numpy")
"""Versions that may differ; it is said."""
_FEW = 3
_SAME_CODE = (
    "all ranks must run the same sources: install one release on every host, or start from a folder that all "
    "hosts see, as `tide submit` does"
)
_SAME_VERSIONS = "install the same on every host, or run all in one container image"
_SAME_FOLDER = "copy the folder anew to where it differs, or name one that all hosts see"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldPart:
    """What a rank holds of a model."""

    part: str
    """Which part, the head aside; equal words, equal parts."""
    digest: str
    """Of its weights."""
    head: str
    """Which ids of the output head."""
    head_digest: str


def recipe_difference(facts: Sequence[RankFacts], trees: Sequence[Tree]) -> str:
    """Say in which keys the recipes of ranks differ from the most frequent one."""
    (_, usual), *others = _by_value([one.recipe for one in facts])
    lines = []
    for _, ranks in others[:_FEW]:
        keys = difference(trees[usual[0]], trees[ranks[0]])
        lines.append(f"{named(ranks, facts)}, unlike {named(usual, facts)}: {'; '.join(keys)}")
    return (
        "recipe: ranks were started with different ones: "
        + " | ".join(lines)
        + "; start every rank with the same run file and overrides"
    )


def version_differences(facts: Sequence[RankFacts]) -> Iterator[str]:
    """Say which versions differ that must not."""
    for name in facts[0].versions:
        if name not in _ONLY_NOTED:
            yield from _differing(name, [one.versions[name] for one in facts], facts, _SAME_VERSIONS)


def content_differences(
    facts: Sequence[RankFacts], found: Sequence[Mapping[str, str]], files: Sequence[Contents]
) -> Iterator[str]:
    """Say which folders hold different things; what no rank can read is told by who needs it.

    Args:
        facts: of all ranks.
        found: of each rank, a digest of what it has.
        files: of each rank, digests of the files of what differs.
    """
    for key in found[0]:
        values = [one[key] for one in found]
        if not all(value.startswith(UNREADABLE) for value in values):
            names = _unlike([one.get(key, {}) for one in files])
            told = f"{key} ({some_of(names)})" if names else key
            yield from _differing(told, values, facts, _SAME_CODE if key == CODE else _SAME_FOLDER)


def _unlike(files: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the names of files that are not the same everywhere, of those who could read theirs."""
    known = [one for one in files if one]
    return sorted(name for name in {*itertools.chain(*known)} if len({one.get(name) for one in known}) > 1)


def shard_differences(facts: Sequence[RankFacts], held: Sequence[Mapping[str, HeldPart]]) -> Iterator[str]:
    """Say where two ranks hold the same part of a model with different weights.

    Args:
        facts: of all ranks.
        held: of each rank, by model.
    """
    for key in held[0]:
        bodies = {rank: one[key].part for rank, one in enumerate(held)}
        heads = {rank: f"{one[key].part} {one[key].head}" for rank, one in enumerate(held)}
        for _, ranks in parts_of(bodies):
            digests = [held[rank][key].digest for rank in ranks]
            yield from _differing(f"{key}.folder: weights in memory", digests, facts, _SAME_FOLDER, ranks)
        for _, ranks in parts_of(heads):
            digests = [held[rank][key].head_digest for rank in ranks]
            yield from _differing(f"{key}.folder: the head in memory", digests, facts, _SAME_FOLDER, ranks)


def disk_lines(folder: str, facts: Sequence[RankFacts], needed: int | None) -> tuple[list[str], list[str]]:
    """Say on which hosts a checkpoint, or a second one beside it, has no room: (faults, warnings).

    Args:
        folder: of the run.
        facts: of all ranks.
        needed: bytes of one checkpoint; None: not known.
    """
    faults, warnings = [], []
    for ranks in by_machine(facts):
        known = [facts[rank].free_bytes for rank in ranks]
        free = min((bytes_ for bytes_ in known if bytes_ is not None), default=None)
        if needed is None or free is None or free >= 2 * needed:
            continue
        line = (
            f"folder: {folder}: {named(ranks, facts)}: {in_bytes(free)} are free, "
            f"one checkpoint takes about {in_bytes(needed)}"
        )
        if free < needed:
            faults.append(f"{line}; make room, or choose another folder=")
        else:
            warnings.append(f"{line}, and the next one is written before an old one goes; make room")
    return faults, warnings


def clock_lines(facts: Sequence[RankFacts], clocks: Mapping[int, ClockOffset], most: float) -> list[str]:
    """Say which hosts' clocks are further from rank 0's than so many seconds, round trips aside."""
    return [
        f"clock: {named([rank], facts)} is {abs(clock.seconds):.1f} s "
        f"{'ahead of' if clock.seconds > 0 else 'behind'} {named([0], facts)}: which failure came first, and "
        "when a job's time ends, is read from clocks; let NTP set them"
        for rank, clock in clocks.items()
        if abs(clock.seconds) - clock.within > most
    ]


def slow_lines(
    facts: Sequence[RankFacts], groups: Sequence[GroupTimes], neighbours: Sequence[float], factor: float
) -> Iterator[str]:
    """Say which groups, and which ranks beside their neighbours, are so many times slower than the median."""
    for times in groups:
        for group, often in times.slow_groups(factor):
            ranks = times.kind.lists[group]
            yield (
                f"links: {named(ranks, facts)} ({', '.join(times.kind.names)}) take {often:.1f} times as "
                "long as the median of their kind; look at the network and the load of these hosts"
            )
    median = statistics.median(neighbours) if neighbours else 0.0
    slow = [rank for rank, seconds in enumerate(neighbours) if seconds >= factor * median]
    if slow:
        often = max(neighbours[rank] for rank in slow) / median
        yield (
            f"links: {named(slow, facts)} give and take up to {often:.1f} times as slowly as the median; a "
            "link between two of them that follow each other, or both links of one, are bad"
        )


def noted(facts: Sequence[RankFacts]) -> Iterator[str]:
    """Say what differs and may."""
    for name in _ONLY_NOTED:
        yield from _differing(name, [one.versions[name] for one in facts], facts, "it should be the same")
    yield from _differing(
        "device", [one.device for one in facts], facts, "every step waits for the slowest one"
    )


def named(ranks: Sequence[int], facts: Sequence[RankFacts]) -> str:
    """Name ranks and their hosts: "ranks 0-3, 6 (host a)"."""
    hosts = list(dict.fromkeys(facts[rank].host for rank in sorted(ranks)))
    more = f" and {len(hosts) - _FEW} more" if len(hosts) > _FEW else ""
    word, place = "rank" + "s" * (len(ranks) > 1), "host" + "s" * (len(hosts) > 1)
    return f"{word} {ranks_in_short(ranks)} ({place} {', '.join(hosts[:_FEW])}{more})"


def ranks_in_short(ranks: Sequence[int], most: int = 8) -> str:
    """Write ranks as runs: "0-3, 6"; the first runs of many."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(told[:most]) + ", ..." * (len(told) > most)


def _differing(
    key: str, values: Sequence[str], facts: Sequence[RankFacts], remedy: str, of: Sequence[int] | None = None
) -> Iterator[str]:
    """Yield a line if values differ: who has which, the rarer ones first, and what to do.

    Args:
        key: what it is a value of.
        values: rank by rank.
        facts: of all ranks.
        remedy: ends the line.
        of: the ranks that the values are of; None: all.
    """
    usual, *others = _by_value(values)
    if others:
        members = range(len(facts)) if of is None else of
        told = [
            f"{named([members[place] for place in places], facts)}: {value}"
            for value, places in (*others[:_FEW], usual)
        ]
        yield f"{key}: differs between ranks: {'; '.join(told)}. {remedy}"


def _by_value(values: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return each value with the places where it stands, the most frequent first, of equals the earlier."""
    counts = Counter(values)
    return [
        (value, [place for place, other in enumerate(values) if other == value])
        for value, _ in counts.most_common()
    ]


def parts_of(parts: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Return the parts of a model, in the order of ranks, with who holds each."""
    found: dict[str, list[int]] = {}
    for rank, part in parts.items():
        found.setdefault(part, []).append(rank)
    return list(found.items())


def by_machine(facts: Sequence[RankFacts]) -> list[list[int]]:
    """Return the ranks of each machine, in the order of their first ones."""
    return [ranks for _, ranks in parts_of({rank: one.machine for rank, one in enumerate(facts)})]


def first_of_machines(facts: Sequence[RankFacts]) -> list[int]:
    """Return the lowest rank of each machine."""
    return [ranks[0] for ranks in by_machine(facts)]
