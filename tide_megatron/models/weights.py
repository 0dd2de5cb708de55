"""How weights map between Hugging Face tensors and ours: each kind of mapping once, in both directions.

A `Piece` describes one tensor of ours, the Hugging Face tensors it is made of, and their shapes. `join` makes
ours from theirs, `split` makes theirs from ours; the same pair moves weights, gradients and fresh random
values. A `Shard` says which pieces a rank holds and under which local name (an expert is numbered from the
rank's first). Cutting single matrices over tensor ranks will be a further property of the shard, read by the
same two methods.

megatron-core keeps query, key and value rows interleaved by group (spec section 6.5): for each key-value
head g, its query heads, then key g, then value g.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]

EXPERT = "{expert}"
"""Stands in a piece's target where the rank's local expert number goes."""


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
class Piece(abc.ABC):
    """One tensor of ours and the Hugging Face tensors it is made of."""

    target: str
    """Our name; of an expert with EXPERT in it."""
    sources: Mapping[str, Shape]
    """Hugging Face name -> shape, in the order `join` takes them."""
    expert: int | None = None
    """Number of the expert in the whole model; None: every rank holds the tensor."""
    fill: float | None = None
    """Fresh value of every element; None: drawn from a normal distribution."""
    is_parameter: bool = True
    """False for a buffer, which no gradient trains."""

    @abc.abstractmethod
    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Make our tensor from theirs."""

    @abc.abstractmethod
    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Make their tensors from ours (views where possible)."""

    @property
    def joined_shape(self) -> Shape:
        """Shape of our tensor: sources are stacked along the first axis."""
        rows, tails = zip(*((shape[0], shape[1:]) for shape in self.sources.values()), strict=True)
        return (sum(rows), *tails[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Piece):
    """The same tensor under two names."""

    @classmethod
    def of(
        cls, target: str, source: str, shape: Shape, fill: float | None = None, is_parameter: bool = True
    ) -> Copy:
        """Name one tensor on both sides."""
        return cls(target=target, sources={source: shape}, fill=fill, is_parameter=is_parameter)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the one part."""
        return parts[0]

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the tensor itself."""
        return (tensor,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qkv(Piece):
    """Query, key and value of their own on their side, interleaved by group on ours."""

    shape: Heads

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave query, key, value."""
        query, key, value = parts
        return self.shape.interleave(query, key, value)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return query, key, value."""
        return self.shape.separate(tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedQkv(Piece):
    """One matrix on their side: all query heads, all key heads, all value heads."""

    shape: Heads

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave the three row ranges."""
        query, key, value = torch.split(parts[0], list(self.shape.rows))
        return self.shape.interleave(query, key, value)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the one fused matrix."""
        return (torch.cat(self.shape.separate(tensor)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedPair(Piece):
    """Gate and up projection on their side, one matrix with the gate's rows first on ours."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Stack gate over up."""
        return torch.cat(list(parts))

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return gate and up."""
        return tensor.chunk(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Which part of a model a rank holds."""

    expert_rank: int = 0
    expert_size: int = 1

    def owner(self, piece: Piece, num_experts: int) -> int:
        """Return the expert rank that holds an expert's piece: experts lie in equal runs, in order."""
        assert piece.expert is not None, f"{piece.target} is held by every rank"
        return piece.expert // (num_experts // self.expert_size)

    def name(self, piece: Piece, num_experts: int) -> str | None:
        """Return the piece's name on this rank, or None when another rank holds it."""
        if piece.expert is None:
            return piece.target
        if self.owner(piece, num_experts) != self.expert_rank:
            return None
        return piece.target.replace(EXPERT, str(piece.expert % (num_experts // self.expert_size)))


def held(pieces: Iterable[Piece], shard: Shard, num_experts: int) -> Iterator[tuple[str, Piece]]:
    """Yield (local name, piece) of everything a rank holds."""
    for piece in pieces:
        name = shard.name(piece, num_experts)
        if name is not None:
            yield name, piece


def to_hf(pieces: Iterable[tuple[str, Piece]], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) for tensors under our names: weights, or their gradients."""
    for name, piece in pieces:
        yield from zip(piece.sources, piece.split(tensors[name]), strict=True)
