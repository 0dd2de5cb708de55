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
from tide_megatron.diffusion.batch import Noised
from tide_megatron.head.gather import row_sizes
from tide_megatron.head.loss import HeadLoss
from tide_megatron.losses.rows import Rows
from tide_megatron.parallel.collectives import gather_objects, gather_vectors
from tide_megatron.parallel.layout import DataShard
from tide_megatron.teachers.exchange import Request, Sizes
from tide_megatron.train.cost import Cost


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


def count(
    noised: Sequence[Noised],
    rows: Sequence[Rows],
    requests: Mapping[str, Request],
    head: HeadLoss,
    cost: Cost,
    shard: DataShard,
) -> Counts:
    """Exchange a step's numbers in ONE collective. All ranks call it together.

    Args:
        noised: this rank's microbatches.
        rows: their masked rows.
        requests: what this rank asks of each teacher.
        head: the losses and the vocabulary group.
        cost: this rank's.
        shard: which part of the data this rank reads. Ranks of one replica read the same samples, which count
            once; the operations of each are its own and all count.

    Raises:
        TideError: on every rank, when a teacher's views and the student's rows are of different samples.
    """
    fingerprints = [example.batch.fingerprint for example in noised]
    mine: dict[str, list[float]] = {
        "divisors": [float(sum(loss.count(example) for example in noised)) for loss in head.losses.values()],
        "totals": [
            float(sum(sum(example.batch.host_lengths) for example in noised)),
            float(sum(len(part.gold) for part in rows)),
        ],
        "flops": [cost.flops],
        "memory": [cost.peak_memory_bytes],
        "rows": [float(size) for part in rows for size in row_sizes(part)],
        "fingerprints": [float(number) for number in fingerprints],
    }
    for name, request in requests.items():
        mine[f"views of {name}"] = [float(number) for number in request.numbers()]
        mine[f"fingerprints of {name}"] = [float(number) for number in request.fingerprints]
    table = _Table(gather_vectors([value for part in mine.values() for value in part]), mine)
    _check_samples(table, requests, noised)
    replica_size = len(table["totals"]) // shard.size
    divisors = (table["divisors"].sum(dim=0) / replica_size).tolist()
    tokens, masked = (table["totals"].sum(dim=0) / replica_size).tolist()
    here = head.group.world_ranks
    return Counts(
        divisors=dict(zip(head.losses, divisors, strict=True)),
        tokens=int(tokens),
        masked=int(masked),
        cost=Cost(flops=float(table["flops"].sum()), peak_memory_bytes=float(table["memory"].max())),
        rows=[list(_split(line, len(noised))) for line in table["rows"][here].long().tolist()],
        view_sizes={
            name: [request.sizes(line) for line in table[f"views of {name}"][here].long().tolist()]
            for name, request in requests.items()
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


def _check_samples(table: _Table, requests: Mapping[str, Request], noised: Sequence[Noised]) -> None:
    """Refuse a teacher that would answer about other samples than the student's, on all ranks alike."""
    for name in requests:
        differs = (table[f"fingerprints of {name}"] != table["fingerprints"]).nonzero()
        if len(differs):
            rank, microbatch = differs[0].tolist()
            ids = gather_objects([example.batch.sample_ids.tolist() for example in noised])[rank]
            raise TideError(
                f"teachers.{name}: on rank {rank}, microbatch {microbatch}, it was asked about other samples "
                f"than the student's {ids[microbatch]}; make a step's views and rows from the same batches"
            )
