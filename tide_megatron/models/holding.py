"""What of a model a rank holds: every tensor under its local name, and how many elements that is."""

from __future__ import annotations

from collections.abc import Iterator

from tide_megatron.models.architecture import Architecture
from tide_megatron.models.shard import Shard
from tide_megatron.models.weights import Head, Piece


def held(architecture: Architecture, shard: Shard, *, merged: bool = False) -> Iterator[tuple[str, Piece]]:
    """Yield (local name, this rank's share) of every tensor a rank holds, in the table's order.

    Args:
        architecture: the model.
        shard: the rank's place in it.
        merged: see `Architecture.pieces`.
    """
    for piece in architecture.pieces(merged=merged):
        name = piece.local_name(shard, architecture.num_experts)
        if name is not None:
            yield name, piece.share(shard)
    head = second_head(architecture, shard)
    if head is not None:
        yield head.target, head


def second_head(architecture: Architecture, shard: Shard) -> Piece | None:
    """Return the rank's slice of a tied head, where its embedding does not hold that slice.

    A tied head is no tensor of its own in a file; such a rank reads the slice a second time.
    """
    if not architecture.tied or shard.embeds_head(architecture.vocabulary):
        return None
    table = (architecture.vocabulary, architecture.hidden)
    return Head.of("output_layer.weight", architecture.embedding_name, table).share(shard)


def held_parameters(architecture: Architecture, shard: Shard) -> int:
    """Return the elements of all parameters that `build_model` allocates on a rank."""
    return sum(piece.elements for _, piece in held(architecture, shard) if piece.is_parameter)
