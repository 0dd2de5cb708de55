"""How fast ranks reach each other, group by group, and how far the clocks of their machines differ.

    latency    the fastest of a few all-reduces and all-to-alls of a number a rank
    rate       the same with 1 MiB a rank on a CPU, 32 MiB on a GPU
    neighbour  every rank gives 1 or 32 MiB to the next one, all at the same time: a bad link shows on both of
               its ranks and on no other

All groups of one kind (the pairs of a tensor-parallel model, say) work at once, as they do in a step. The
first call of each is not counted: it makes connections. An all-to-all joins each two ranks of a group, so
what came through here has also shown that the ports which the groups need are open between them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_megatron.base.device import Device
from tide_megatron.parallel.collectives import broadcast_object, gather_vectors
from tide_megatron.parallel.groups import own_group
from tide_megatron.parallel.layout import Layout, RankList
from tide_megatron.parallel.vocab_group import across_replicas, vocab_groups

BYTES = {"cpu": 2**20, "cuda": 2**25}
"""That each rank hands over where rates are measured, by kind of device."""
SMALL_ROUNDS, LARGE_ROUNDS = 5, 2
PATIENCE_SECONDS = 0.25
"""A call that takes longer is not repeated."""
CLOCK_ROUNDS = 7
MEASURES = ("reduce_latency", "reduce", "exchange_latency", "exchange")
"""What is timed of a group, in this order; the two without a suffix are of `BYTES`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupKind:
    """Groups of the same purpose; they are disjoint."""

    names: tuple[str, ...]
    """What they are for; several where models share them."""
    lists: tuple[RankList, ...]
    """The ranks of each group of several ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupTimes:
    """What was measured of the groups of one kind; seconds by `MEASURES`, group by group."""

    kind: GroupKind
    seconds: Mapping[str, tuple[float, ...]]
    bytes: int
    """That each rank handed over."""

    def rate(self, measure: str, group: int) -> float:
        """Return the bytes a second that each rank of a group sent in a large all-reduce or all-to-all."""
        size = len(self.kind.lists[group])
        sent = self.bytes * (size - 1) / size * (2 if measure == "reduce" else 1)
        return sent / self.seconds[measure][group]

    def slow_groups(self, factor: float) -> list[tuple[int, float]]:
        """Return the groups where a large call took `factor` times the kind's median, and how many times."""
        found: dict[int, float] = {}
        for measure in ("reduce", "exchange"):
            taken = self.seconds[measure]
            median = statistics.median(taken)
            for group, seconds in enumerate(taken):
                if seconds >= factor * median:
                    found[group] = max(found.get(group, 0.0), seconds / median)
        return sorted(found.items())


def group_kinds(
    student: Layout, teachers: Mapping[str, Layout], head_ranks: int, world: int
) -> list[GroupKind]:
    """List the groups of several ranks that a run communicates over, each set of ranks once.

    Args:
        student: its layout.
        teachers: theirs, by name.
        head_ranks: size of the vocabulary groups.
        world: ranks.
    """
    named: list[tuple[str, Iterable[RankList]]] = [("all ranks", (tuple(range(world)),))]
    own = student.rank_lists(world)
    named += [
        ("student data", own.data),
        ("student experts", own.expert),
        ("student expert data", own.expert_data),
    ]
    named.append(("vocabulary", vocab_groups(world, head_ranks)))
    for name, layout in teachers.items():
        lists = layout.rank_lists(world)
        named += [
            (f"{name} tensor", lists.tensor),
            (f"{name} pipeline", lists.pipeline),
            (f"{name} experts", lists.expert),
            (f"{name} expert tensor", lists.expert_tensor),
            (f"{name} replica", lists.replica),
            (f"{name} rows", across_replicas(layout, world, head_ranks)),
        ]
    found: dict[tuple[RankList, ...], list[str]] = {}
    for name, groups in named:
        several = tuple(ranks for ranks in groups if len(ranks) > 1)
        if several:
            found.setdefault(several, []).append(name)
    return [GroupKind(names=tuple(names), lists=lists) for lists, names in found.items()]


def time_groups(kinds: Sequence[GroupKind], device: Device) -> list[GroupTimes]:
    """Measure groups that were made already, kind by kind. All ranks of the world call it together.

    Args:
        kinds: the same list on every rank.
        device: where tensors are.
    """
    own = [seconds for kind in kinds for seconds in _time_kind(kind, device)]
    taken = gather_vectors(own).view(-1, len(kinds), len(MEASURES))  # [ranks, kinds, measures]
    return [
        GroupTimes(
            kind=kind,
            seconds={
                measure: tuple(float(taken[list(ranks), number, column].max()) for ranks in kind.lists)
                for column, measure in enumerate(MEASURES)
            },
            bytes=BYTES[device.type],
        )
        for number, kind in enumerate(kinds)
    ]


def _time_kind(kind: GroupKind, device: Device) -> tuple[float, ...]:
    """Return this rank's seconds, by `MEASURES`; zeros where it is in none of the groups."""
    group = own_group(kind.lists)
    if group is None:
        return tuple(0.0 for _ in MEASURES)
    seconds = []
    for exchange in (False, True):
        for size, rounds in ((4, SMALL_ROUNDS), (BYTES[device.type] // group.size(), LARGE_ROUNDS)):
            given = torch.zeros(group.size() * (size // 4), device=device.torch_device)
            taken = torch.empty_like(given) if exchange else None
            seconds.append(_fastest(_call(given, taken, group), rounds, group, device))
    return seconds[0], seconds[1], seconds[2], seconds[3]


def _call(given: torch.Tensor, taken: torch.Tensor | None, group: ProcessGroup) -> Callable[[], object]:
    """Return an all-to-all into a second tensor, or the all-reduce of one."""
    if taken is None:
        return lambda: dist.all_reduce(given, group=group)
    return lambda: dist.all_to_all_single(taken, given, group=group)


def _fastest(call: Callable[[], object], rounds: int, group: ProcessGroup | None, device: Device) -> float:
    """Return the seconds of the fastest call, the first one aside. All ranks of the group call it."""
    first = torch.tensor(_seconds(call, device), device=device.torch_device)
    dist.all_reduce(first, op=dist.ReduceOp.MAX, group=group)
    if float(first) > PATIENCE_SECONDS:
        return float(first)
    return min(_seconds(call, device) for _ in range(rounds))


def _seconds(call: Callable[[], object], device: Device) -> float:
    """Time one call, on a GPU until it has ended there."""
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device.torch_device)
    return time.perf_counter() - begun


def time_neighbours(device: Device) -> list[float]:
    """Return how long each rank took to give `BYTES` to the next one and to take as many from the last.

    All ranks of the world call it together; there are three or more.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    elements = BYTES[device.type] // 4
    given, taken = (torch.zeros(elements, device=device.torch_device) for _ in range(2))
    sent, received = [0] * world, [0] * world
    sent[(rank + 1) % world] = received[(rank - 1) % world] = elements

    def call() -> None:
        dist.all_to_all_single(taken, given, received, sent)

    return [float(seconds) for seconds in gather_vectors([_fastest(call, LARGE_ROUNDS, None, device)])[:, 0]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClockOffset:
    """How a rank's time of day stands to rank 0's."""

    seconds: float
    """How much it is ahead."""
    within: float
    """Half of the fastest round trip to it: the true number is no further off."""


def clock_offsets(ranks: Sequence[int], clock: Callable[[], float] = time.time) -> dict[int, ClockOffset]:
    """Ask some ranks for the time of day, several times; the fastest answer counts. All ranks call it.

    Args:
        ranks: whom rank 0 asks, one after the other; not itself.
        clock: this rank's.

    Returns:
        By rank, the same on every rank.
    """
    found = {}
    own = dist.get_rank() if dist.is_initialized() else 0
    for rank in ranks:
        if own == 0:
            found[rank] = _ask(rank, clock)
        elif own == rank:
            for _ in range(CLOCK_ROUNDS):
                dist.recv(torch.empty(1, dtype=torch.float64), 0)
                dist.send(torch.tensor([clock()], dtype=torch.float64), 0)
    return broadcast_object(found if own == 0 else None)


def _ask(rank: int, clock: Callable[[], float]) -> ClockOffset:
    """Ask one rank for the time, as rank 0."""
    best = ClockOffset(seconds=0.0, within=math.inf)
    answer = torch.empty(1, dtype=torch.float64)
    for _ in range(CLOCK_ROUNDS):
        asked_at, begun = clock(), time.perf_counter()
        dist.send(torch.zeros(1, dtype=torch.float64), rank)
        dist.recv(answer, rank)
        half = (time.perf_counter() - begun) / 2
        if half < best.within:
            best = ClockOffset(seconds=float(answer) - (asked_at + half), within=half)
    return best
