"""What of a model a rank holds: every tensor under its local name, and how many elements that is."""

from __future__ import annotations

from collections.abc import Iterator

from tide_megatron.models.architecture import Architecture
from tide_megatron.models.shard import Shard
from tide_megatron.models.weights import Head, Piece


def held(architecture: Architecture, shard: Shard) -> Iterator[tuple[str, Piece]]:
    """Yield (local name, this rank's share) of every tensor a rank holds, in the table's order.

    A tied head is no tensor of its own in a file; a rank whose embedding does not hold its slice of the head
    reads that slice a second time.
    """
    for piece in architecture.pieces():
        name = piece.local_name(shard, architecture.num_experts)
        if name is not None:
            yield name, piece.share(shard)
    if architecture.tied and not shard.embeds_head(architecture.vocabulary):
        table = (architecture.vocabulary, architecture.hidden)
        head = Head.of("output_layer.weight", architecture.embedding_name, table)
        yield head.target, head.share(shard)


def held_parameters(architecture: Architecture, shard: Shard) -> int:
    """Return the elements of all parameters that `build_model` allocates on a rank."""
    return sum(piece.elements for _, piece in held(architecture, shard) if piece.is_parameter)
