"""Which part of a model a rank holds, and which part of a stored tensor that is: arithmetic only.

A `Shard` is a rank's place in its model's layout, without process groups, so that a planner can ask for every
rank of a machine it does not have. A `Part` says which rows or columns of one stored tensor to read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tide_megatron.base.errors import ConfigError
from tide_megatron.parallel.layout import Layout

Shape = tuple[int, ...]
Range = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One of `size` equal slices of an axis."""

    rank: int = 0
    size: int = 1

    def range(self, length: int, start: int = 0) -> Range:
        """Return [start, stop) of this rank's share of `length` rows or columns that begin at `start`."""
        share, rest = divmod(length, self.size)
        assert not rest, f"{length} rows or columns do not share evenly among {self.size}: check_widths"
        return start + self.rank * share, start + (self.rank + 1) * share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Which rows (axis 0) or columns (axis 1) of a stored tensor a rank holds, in their order."""

    axis: int = 0
    ranges: tuple[Range, ...]
    """[start, stop) of each run."""
    zero_rows: int = 0
    """Rows of zeros behind them that only pad; no file has them."""
    number: int | None = None
    """Index in the stack that the file stores; None: the tensor is stored alone."""

    def shape(self, whole: Shape) -> Shape:
        """Return the shape of the part of a tensor of shape `whole`, which is not a stack."""
        size = sum(stop - start for start, stop in self.ranges) + self.zero_rows
        return (*whole[: self.axis], size, *whole[self.axis + 1 :])

    def take(self, source: Any) -> Tensor:
        """Return the part of a tensor, or of a lazily read one that knows slices only."""
        before = () if self.number is None else (slice(self.number, self.number + 1),)
        columns = (slice(None),) * self.axis
        wanted = [slice(start, stop) for start, stop in self.ranges if stop > start] or [slice(0, 0)]
        runs = [source[(*before, *columns, run)] for run in wanted]
        if self.number is not None:
            runs = [run[0] for run in runs]
        if self.zero_rows:
            runs.append(runs[0].new_zeros(self.zero_rows, *runs[0].shape[1:]))
        return torch.cat(runs, dim=self.axis) if len(runs) > 1 else runs[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A rank's place in its model: the defaults are for one rank alone."""

    tensor_rank: int = 0
    tensor_size: int = 1
    expert_tensor_rank: int = 0
    expert_tensor_size: int = 1
    expert_rank: int = 0
    """Which equal run of the experts."""
    expert_size: int = 1
    first_layer: int = 0
    """Number of the stage's first layer in the whole model."""
    num_layers: int
    """Layers of the stage."""
    is_first: bool = True
    """The stage embeds."""
    is_last: bool = True
    """The stage has the final norm."""
    head: Range | None = None
    """Ids [start, stop) whose rows of the output head this rank holds, on whatever stage; None: all."""

    @classmethod
    def of(cls, layout: Layout, rank: int, world: int, layers: int, head: Range | None = None) -> Shard:
        """Return what a rank holds.

        Args:
            layout: already checked (`Layout.check`).
            rank: 0 .. world - 1.
            world: number of ranks.
            layers: of the whole model.
            head: see the field.
        """
        assert 0 <= rank < world, f"rank {rank} of {world}"
        at = layout.coordinates(rank)
        stages = layout.stage_layers(layers)
        # Over a stage's ranks, ascending, expert_tensor is fastest, then expert (parallel.layout).
        block, slice_rank = divmod(at.tensor + layout.tensor * at.data, layout.expert_tensor)
        return cls(
            tensor_rank=at.tensor,
            tensor_size=layout.tensor,
            expert_tensor_rank=slice_rank,
            expert_tensor_size=layout.expert_tensor,
            expert_rank=block % layout.expert,
            expert_size=layout.expert,
            first_layer=sum(stages[: at.pipeline]),
            num_layers=stages[at.pipeline],
            is_first=at.pipeline == 0,
            is_last=at.pipeline == layout.pipeline - 1,
            head=head,
        )

    @property
    def tensor(self) -> Slice:
        """Which slice of dense matrices."""
        return Slice(rank=self.tensor_rank, size=self.tensor_size)

    @property
    def expert_tensor(self) -> Slice:
        """Which slice of the experts' matrices."""
        return Slice(rank=self.expert_tensor_rank, size=self.expert_tensor_size)

    @property
    def is_uncut(self) -> bool:
        """Whether the rank holds every tensor whole, experts of other ranks aside."""
        sizes = (self.tensor_size, self.expert_tensor_size)
        return max(sizes) == 1 and self.is_first and self.is_last and self.head is None

    def holds_layer(self, layer: int) -> bool:
        """Say whether a layer (from 0) is in this stage."""
        return self.first_layer <= layer < self.first_layer + self.num_layers

    def expert_owner(self, expert: int, num_experts: int) -> int:
        """Return the expert rank that holds an expert: experts lie in equal runs, in order."""
        return expert // (num_experts // self.expert_size)

    def padded_vocabulary(self, vocabulary: int) -> int:
        """Return the rows of the whole embedding: megatron-core needs a multiple of the tensor ranks."""
        return -(-vocabulary // self.tensor_size) * self.tensor_size

    def embedding_ids(self, vocabulary: int) -> Range:
        """Return the ids [start, stop) whose embedding rows this rank has, were it on the first stage."""
        start, stop = self.tensor.range(self.padded_vocabulary(vocabulary))
        return min(start, vocabulary), min(stop, vocabulary)

    def head_ids(self, vocabulary: int) -> Range:
        """Return the ids [start, stop) of this rank's slice of the output head.

        Raises:
            ConfigError: for a slice outside the vocabulary.
        """
        start, stop = self.head or (0, vocabulary)
        if not 0 <= start <= stop <= vocabulary:
            raise ConfigError(
                f"head: ids [{start}, {stop}) are not a range of the {vocabulary} ids of the model"
            )
        return start, stop

    def embeds_head(self, vocabulary: int) -> bool:
        """Say whether this rank's embedding holds its slice of a tied head, which needs no storage then."""
        first, end = self.embedding_ids(vocabulary)
        start, stop = self.head_ids(vocabulary)
        return self.is_first and (start == stop or (first <= start and stop <= end))
