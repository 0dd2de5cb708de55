"""How many floating-point operations the mathematics of a forward pass needs, from lengths alone.

One definition, said in full in docs/metrics.md: matrix products only, two operations for a multiplication and
its addition; real tokens only; attention for the pairs that the mask allows; the experts that a token is sent
to; the last layer's feed-forward only at the rows that are asked for, because nobody reads the others and the
model does not make them (its attention counts whole, as it is made). Norms, softmaxes, rotations, activations
and embeddings count nothing. Plain integers: no tensor, no device.
"""

from __future__ import annotations

from collections.abc import Sequence

from tide_megatron.diffusion.mask import Context, allowed_pairs
from tide_megatron.models.architecture import Architecture


def body_flops(architecture: Architecture, context: Context, lengths: Sequence[int], rows: int) -> int:
    """Count one forward pass from embedded tokens to hidden rows.

    Args:
        architecture: of the model.
        context: what it reads; every part of the sequence counts.
        lengths: real tokens of each sample, in one part.
        rows: positions that are asked for, of all samples.
    """
    tokens = context.parts * sum(lengths)
    pairs = sum(allowed_pairs(context, length) for length in lengths)
    attention = tokens * _projections(architecture) + pairs * _pair(architecture)
    last = architecture.layers - 1
    before = sum(_feed_forward(architecture, layer) for layer in range(last))
    return architecture.layers * attention + tokens * before + rows * _feed_forward(architecture, last)


def head_flops(architecture: Architecture, rows: int) -> int:
    """Count the logits of some rows over the whole vocabulary, once."""
    return 2 * rows * architecture.hidden * architecture.vocabulary


def _projections(architecture: Architecture) -> int:
    """Return what queries, keys, values and the output of attention cost a token in one layer."""
    heads = 2 * architecture.heads + 2 * architecture.query_groups
    return 2 * architecture.hidden * architecture.head_dim * heads


def _pair(architecture: Architecture) -> int:
    """Return what a score and its share of the value cost one (query, key) pair in one layer."""
    return 4 * architecture.heads * architecture.head_dim


def _feed_forward(architecture: Architecture, layer: int) -> int:
    """Return what a layer's feed-forward costs a token: gate, up and down, or router and experts."""
    experts, width = architecture.experts, architecture.hidden
    if experts is None or not architecture.is_mixture(layer):
        return 6 * width * architecture.feed_forward
    chosen = experts.per_token * experts.feed_forward + experts.shared_feed_forward
    return 2 * width * experts.number + 6 * width * chosen
