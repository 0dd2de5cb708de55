"""The one count collective of a step: every divisor, and how long everything is that will travel.

Each rank says what it has, for all microbatches of the step at once; all ranks hear it (design section 6).
So weights and 1/count enter the losses before the forward pass, no later exchange asks the host for a length,
and a teacher that was asked about other samples than the student is found before anything is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tide_megatron.base.errors import TideError
from tide_megatron.head.loss import HeadLoss
from tide_megatron.parallel.collectives import gather_objects, gather_vectors
from tide_megatron.parallel.layout import DataShard
from tide_megatron.teachers.exchange import Sizes
from tide_megatron.train.cost import Cost
from tide_megatron.train.step_input import StepInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What all ranks know of a step before its first forward pass."""

    divisors: Mapping[str, float]
    """Of each loss."""
    tokens: int
    """Clean tokens without pads, over all ranks."""
    masked: int
    """Rows to predict, over all ranks."""
    rows: Sequence[Sequence[Sequence[int]]]
    """[group rank][microbatch]: how that rank's `Rows` are packed."""
    cost: Cost
    """Of all ranks."""
    view_sizes: Mapping[str, Sequence[Sizes]]
    """Teacher -> [group rank][microbatch][pass]."""


def count(given: StepInput, head: HeadLoss, shard: DataShard, memory_bytes: float) -> Counts:
    """Exchange a step's numbers in ONE collective. All ranks call it together.

    Args:
        given: what this rank reads.
        head: the losses and the vocabulary group.
        shard: which part of the data this rank reads. Ranks of one replica read the same samples, which count
            once; the operations of each are its own and all count.
        memory_bytes: the most that this rank has held so far.

    Raises:
        TideError: on every rank, when a teacher's views and the student's rows are of different samples.
    """
    mine = {**given.numbers, "memory": [memory_bytes]}
    table = _Table(gather_vectors([value for part in mine.values() for value in part]), mine)
    _check_samples(table, given)
    replica_size = len(table["totals"]) // shard.size
    divisors = (table["divisors"].sum(dim=0) / replica_size).tolist()
    tokens, masked = (table["totals"].sum(dim=0) / replica_size).tolist()
    here = head.group.world_ranks
    return Counts(
        divisors=dict(zip(head.losses, divisors, strict=True)),
        tokens=int(tokens),
        masked=int(masked),
        cost=Cost(flops=float(table["flops"].sum()), peak_memory_bytes=float(table["memory"].max())),
        rows=[list(_split(line, len(given.noised))) for line in table["rows"][here].long().tolist()],
        view_sizes={
            name: [request.sizes(line) for line in table[f"views of {name}"][here].long().tolist()]
            for name, request in given.requests.items()
        },
    )


class _Table:
    """Every rank's numbers, [ranks, numbers], by section."""

    def __init__(self, numbers: Tensor, sections: Mapping[str, Sequence[float]]) -> None:
        parts = torch.split(numbers, [len(section) for section in sections.values()], dim=1)
        self._parts = dict(zip(sections, parts, strict=True))

    def __getitem__(self, section: str) -> Tensor:
        return self._parts[section]


def _split(numbers: Sequence[int], parts: int) -> Iterator[Sequence[int]]:
    size = len(numbers) // parts
    return (numbers[first : first + size] for first in range(0, len(numbers), size)) if size else iter([])


def _check_samples(table: _Table, given: StepInput) -> None:
    """Refuse a teacher that would answer about other samples than the student's, on all ranks alike."""
    for name in given.requests:
        differs = (table[f"fingerprints of {name}"] != table["fingerprints"]).nonzero()
        if len(differs):
            rank, microbatch = differs[0].tolist()
            ids = gather_objects([example.batch.sample_ids.tolist() for example in given.noised])[rank]
            raise TideError(
                f"teachers.{name}: on rank {rank}, microbatch {microbatch}, it was asked about other samples "
                f"than the student's {ids[microbatch]}; make a step's views and rows from the same batches"
            )
