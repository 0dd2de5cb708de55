"""How weights map between Hugging Face tensors and ours: each kind of mapping once, in both directions.

A `ParamMapping` describes one tensor of ours, the Hugging Face tensors it is made of, and their shapes.
`join` makes ours from theirs, `split` makes theirs from ours; the same pair moves weights, gradients and
fresh random values. `share` gives the mapping of one rank's part: the same over the rows or columns of each
source that the rank reads, so cut and uncut models go through the same two methods. `params.py` lists them.

megatron-core keeps query, key and value rows interleaved by group (spec section 6.5): for each key-value
head g, its query heads, then key g, then value g. A tensor cut is therefore a run of whole groups.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from tide_megatron.models.shard import Part, Shape, Shard, Slice

EXPERT, LAYER = "{expert}", "{layer}"
"""Stand in a target where the rank's local numbers of expert and layer go."""

Place = Literal["every", "first", "last"]
"""Which pipeline stages hold a tensor that is in no layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """How the rows of query, key and value matrices are grouped."""

    heads: int
    groups: int
    head_dim: int

    @property
    def query_rows(self) -> int:
        """Rows of the query matrix."""
        return self.heads * self.head_dim

    @property
    def key_rows(self) -> int:
        """Rows of the key matrix, and of the value matrix."""
        return self.groups * self.head_dim

    def shared(self, size: int) -> Heads:
        """Return the heads of one of `size` ranks."""
        return Heads(heads=self.heads // size, groups=self.groups // size, head_dim=self.head_dim)

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of query, key and value."""
        return self.query_rows, self.key_rows, self.key_rows

    def interleave(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Merge three matrices (or biases) into megatron's order by group."""
        blocks = [
            part.reshape(self.groups, -1, *part.shape[1:]) for part in (query, key, value)
        ]  # [groups, rows, ...]
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def separate(self, merged: Tensor) -> tuple[Tensor, ...]:
        """Undo `interleave`."""
        by_group = merged.reshape(self.groups, -1, *merged.shape[1:])  # [groups, rows, ...]
        blocks = torch.split(by_group, [rows // self.groups for rows in self.rows], dim=1)
        return tuple(block.flatten(0, 1) for block in blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamMapping(abc.ABC):
    """One tensor of ours and the Hugging Face tensors it is made of."""

    target: str
    """Our name, with LAYER and EXPERT where local numbers go."""
    sources: Mapping[str, Shape]
    """Hugging Face name -> whole shape, in the order `join` takes them."""
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    """Hugging Face name -> what of it this rank holds; absent: all."""
    layer: int | None = None
    """Number of the layer in the whole model; None: outside the layers."""
    place: Place = "every"
    expert: int | None = None
    """Number of the expert in the whole model; None: every rank of the stage holds the tensor."""
    stack: int = 0
    """How many experts' tensors the stored tensor stacks; ours is number `expert`. 0: it is no stack."""
    fill: float | None = None
    """Fresh value of every element; None: drawn from a normal distribution."""
    is_parameter: bool = True
    """False for a buffer, which no gradient trains."""

    @abc.abstractmethod
    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Make our tensor from (this rank's parts of) theirs."""

    @abc.abstractmethod
    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Make (this rank's parts of) their tensors from ours (views where possible)."""

    @abc.abstractmethod
    def cut(self, to: Slice) -> ParamMapping:
        """Return the mapping of one tensor rank's part."""

    def share(self, shard: Shard) -> ParamMapping:
        """Return the mapping of the part a rank holds; `local_name` says whether it holds one at all."""
        to = shard.tensor if self.expert is None else shard.expert_tensor
        return self if to.size == 1 else self.cut(to)

    def local_name(self, shard: Shard, num_experts: int) -> str | None:
        """Return our name of the tensor on a rank, or None when another rank holds it."""
        name = self.target
        if (self.place == "first" and not shard.is_first) or (self.place == "last" and not shard.is_last):
            return None
        if self.layer is not None:
            if not shard.holds_layer(self.layer):
                return None
            name = name.replace(LAYER, str(self.layer - shard.first_layer))
        if self.expert is not None:
            if shard.expert_owner(self.expert, num_experts) != shard.expert_rank:
                return None
            name = name.replace(EXPERT, str(self.expert % (num_experts // shard.expert_size)))
        return name

    @property
    def stored(self) -> dict[str, Shape]:
        """Hugging Face name -> shape of the tensor in a file."""
        stacked = (self.stack,) if self.stack else ()
        return {name: (*stacked, *shape) for name, shape in self.sources.items()}

    def part(self, source: str) -> Part | None:
        """Return what this rank reads of a tensor in a file; None: all."""
        part = self.parts.get(source)
        if not self.stack:
            return part
        whole = Part(ranges=((0, self.sources[source][0]),))
        return dataclasses.replace(part or whole, number=self.expert)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Hugging Face name -> shape of what this rank holds of it."""
        return {
            name: self.parts[name].shape(shape) if name in self.parts else shape
            for name, shape in self.sources.items()
        }

    @property
    def joined_shape(self) -> Shape:
        """Shape of our tensor: sources are stacked along the first axis."""
        rows, tails = zip(*((shape[0], shape[1:]) for shape in self.shapes.values()), strict=True)
        return (sum(rows), *tails[0])

    @property
    def elements(self) -> int:
        """Elements of our tensor."""
        return math.prod(self.joined_shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(ParamMapping):
    """The same tensor under two names."""

    axis: int | None = None
    """What tensor ranks cut: rows (0), columns (1), or nothing."""

    @classmethod
    def of(
        cls,
        target: str,
        source: str,
        shape: Shape,
        fill: float | None = None,
        is_parameter: bool = True,
        place: Place = "every",
    ) -> Copy:
        """Name one tensor on both sides."""
        return cls(target=target, sources={source: shape}, fill=fill, is_parameter=is_parameter, place=place)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the one part."""
        return parts[0]

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the tensor itself."""
        return (tensor,)

    def cut(self, to: Slice) -> ParamMapping:
        """Take a rank's rows or columns."""
        if self.axis is None:
            return self
        ((name, shape),) = self.sources.items()
        part = Part(axis=self.axis, ranges=(to.range(shape[self.axis]),))
        return dataclasses.replace(self, parts={name: part})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingRows(Copy):
    """The rows of a vocabulary, filled up with zero rows to a multiple of the tensor ranks."""

    def share(self, shard: Shard) -> ParamMapping:
        """Take a tensor rank's rows."""
        ((name, (vocabulary, _)),) = self.sources.items()
        if shard.tensor_size == 1:
            return self
        start, stop = shard.embedding_ids(vocabulary)
        rows = shard.padded_vocabulary(vocabulary) // shard.tensor_size
        part = Part(ranges=((start, stop),), zero_rows=rows - (stop - start))
        return dataclasses.replace(self, parts={name: part})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadRows(Copy):
    """The rows of the output head: whatever ids a rank is asked to hold, on every stage."""

    def share(self, shard: Shard) -> ParamMapping:
        """Take the rows of the rank's ids."""
        ((name, (vocabulary, _)),) = self.sources.items()
        if shard.head is None:
            return self
        return dataclasses.replace(self, parts={name: Part(ranges=(shard.head_ids(vocabulary),))})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qkv(ParamMapping):
    """Query, key and value of their own on their side, interleaved by group on ours."""

    shape: Heads

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave query, key, value."""
        query, key, value = parts
        return self.shape.interleave(query, key, value)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return query, key, value."""
        return self.shape.separate(tensor)

    def cut(self, to: Slice) -> ParamMapping:
        """Take a rank's groups."""
        return dataclasses.replace(self, parts=_row_parts(self.sources, to), shape=self.shape.shared(to.size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedQkv(ParamMapping):
    """One matrix on their side: all query heads, all key heads, all value heads."""

    shape: Heads

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave the three row ranges."""
        query, key, value = torch.split(parts[0], list(self.shape.rows))
        return self.shape.interleave(query, key, value)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the one fused matrix."""
        return (torch.cat(self.shape.separate(tensor)),)

    def cut(self, to: Slice) -> ParamMapping:
        """Take a rank's groups: a run of rows from each of the three ranges."""
        ((name, _),) = self.sources.items()
        query, key, value = self.shape.rows
        starts = ((query, 0), (key, query), (value, query + key))
        part = Part(ranges=tuple(to.range(rows, start) for rows, start in starts))
        return dataclasses.replace(self, parts={name: part}, shape=self.shape.shared(to.size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedPair(ParamMapping):
    """Gate and up projection on their side, one matrix with the gate's rows first on ours."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Stack gate over up."""
        return torch.cat(list(parts))

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return gate and up."""
        return tensor.chunk(2)

    def cut(self, to: Slice) -> ParamMapping:
        """Take a rank's rows of both, so that each gate row keeps its up row beside it."""
        return dataclasses.replace(self, parts=_row_parts(self.sources, to))


def _row_parts(sources: Mapping[str, Shape], to: Slice) -> dict[str, Part]:
    """Cut the rows of every source alike."""
    return {name: Part(ranges=(to.range(shape[0]),)) for name, shape in sources.items()}
