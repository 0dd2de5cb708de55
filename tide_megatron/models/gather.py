"""The way back from a cut model: every rank's tensors in, whole Hugging Face tensors out, one by one.

It is arithmetic over the same table as loading: no process group, no model. What several ranks hold (norms,
routers, whatever data-parallel ranks repeat) must agree bit for bit, because nobody could say which copy is
right; rows that only pad a vocabulary are dropped. Tensors are asked for as they are needed, so a mapping
that reads files keeps one whole tensor in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tide_megatron.base.errors import CheckpointError
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.holding import second_head
from tide_megatron.models.shard import Part, Shape, Shard
from tide_megatron.models.weights import Embedding, Piece


def whole(
    architecture: Architecture, shards: Sequence[Shard], tensors: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor) in the order of the table of weights.

    Args:
        architecture: the model.
        shards: the place of each rank; together they hold the model at least once.
        tensors: what each of these ranks holds, weights and buffers, by local name; may be lazy.

    Raises:
        CheckpointError: naming the tensor that two ranks hold differently, that nobody holds in full, or that
            a rank lacks or has in another shape.
    """
    assert len(shards) == len(tensors), f"{len(shards)} ranks but tensors of {len(tensors)}"
    for piece in architecture.pieces():
        collected = {name: _Collected(name, shape) for name, shape in piece.sources.items()}
        for rank, (shard, own) in enumerate(zip(shards, tensors, strict=True)):
            for name, held in _copies(architecture, piece, shard):
                if name not in own:
                    raise CheckpointError(f"{name}: rank {rank} lacks it; give all tensors of that rank")
                if tuple(own[name].shape) != held.joined_shape:
                    raise CheckpointError(
                        f"{name}: rank {rank} has {list(own[name].shape)}, its layout says "
                        f"{list(held.joined_shape)}; give the layout that wrote it"
                    )
                for source, part in zip(held.sources, held.split(own[name].detach()), strict=True):
                    collected[source].add(part, held.parts.get(source), rank)
        for name, found in collected.items():
            yield name, found.finish()


def _copies(architecture: Architecture, piece: Piece, shard: Shard) -> Iterator[tuple[str, Piece]]:
    """Yield (local name, share) of what a rank holds of a piece: a tied head may be a second copy of rows."""
    name = piece.local_name(shard, architecture.num_experts)
    if name is not None:
        yield name, piece.share(shard)
    head = second_head(architecture, shard) if isinstance(piece, Embedding) else None
    if head is not None:
        yield head.target, head


@dataclasses.dataclass
class _Collected:
    """One whole tensor that fills up from the parts of ranks."""

    name: str
    shape: Shape
    tensor: Tensor | None = None
    axis: int = 0
    giver: Tensor | None = None
    """[rows or columns] int64: the rank that gave each; -1: nobody yet."""

    def add(self, part: Tensor, place: Part | None, rank: int) -> None:
        """Take in a rank's part; where somebody was before it, both must agree.

        Args:
            part: as `Piece.split` gives it.
            place: where it belongs; None: it is the whole.
            rank: whose.
        """
        place = place or Part(axis=self.axis, ranges=((0, self.shape[self.axis]),))
        if self.tensor is None or self.giver is None:
            self.axis = place.axis
            self.tensor = torch.empty(self.shape, dtype=part.dtype)
            self.giver = torch.full((self.shape[self.axis],), -1)
        assert place.axis == self.axis, f"{self.name} is cut by rows on one rank and by columns on another"
        if part.dtype is not self.tensor.dtype:
            raise CheckpointError(
                f"{self.name}: rank {rank} holds {part.dtype}, another rank {self.tensor.dtype}; "
                "give ranks of one run"
            )
        begin = 0
        for start, stop in place.ranges:
            given = part.narrow(self.axis, begin, stop - start).to(self.tensor.device)
            begin += stop - start
            here, giver = self.tensor.narrow(self.axis, start, stop - start), self.giver[start:stop]
            self._agree(here, given, giver, rank)
            here.copy_(given)
            giver[giver < 0] = rank

    def finish(self) -> Tensor:
        """Return the whole tensor, on CPU."""
        if self.tensor is None or self.giver is None:
            raise CheckpointError(f"{self.name}: no rank holds it; give the ranks of a whole replica")
        missing = int((self.giver < 0).sum())
        if missing:
            kind = "columns" if self.axis else "rows"
            raise CheckpointError(
                f"{self.name}: {missing} of {len(self.giver)} {kind} are on no rank; "
                "give the ranks of a whole replica"
            )
        return self.tensor

    def _agree(self, here: Tensor, given: Tensor, giver: Tensor, rank: int) -> None:
        """Compare, as bits, what a rank gives with what others gave."""
        known = giver >= 0
        if not known.any():
            return
        chosen = known.nonzero()[:, 0]
        old, new = (_bits(tensor.index_select(self.axis, chosen)) for tensor in (here, given))
        if not torch.equal(old, new):
            others = ", ".join(map(str, sorted(set(giver[known].tolist()))))
            raise CheckpointError(
                f"{self.name}: rank {rank} holds other values than rank {others} although both hold the same "
                "part of the model; one of them is damaged or of another step"
            )


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: NaNs are equal to themselves and -0 is not 0."""
    return tensor.contiguous().view(torch.uint8)
