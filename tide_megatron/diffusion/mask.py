"""Who may attend to whom: one predicate per context kind, from which every rendering is made.

A dense bool mask is rendered here (SDPA on CPU, tests); `models/attention.py` renders the same predicate as
a FlexAttention BlockMask and in structured form; `decode/passes.py` as what a pass sees of a cache.
The predicate is elementwise arithmetic on positions, so it also runs under the vmap of FlexAttention.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.base.options import Paper

ContextKind = Literal["bidirectional", "block_causal", "block_diffusion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a token may attend to."""

    kind: Annotated[ContextKind, Paper("student: block_diffusion")]
    """`bidirectional`: everything; `block_causal`: its own block and those before it; `block_diffusion`: the
    model reads [x_t ; x_0], and a noised block sees itself and the clean blocks before it."""
    # The bound is said again, for recipes, whose message names the whole key.
    block_size: Annotated[int, Field(ge=1), Paper("32")] = 32
    """Tokens of a block; `bidirectional` has none."""

    def __post_init__(self) -> None:
        """Refuse unknown kinds and empty blocks."""
        if self.kind not in get_args(ContextKind):
            raise ConfigError(
                f"context.kind: {self.kind!r} is unknown; {nearest(self.kind, get_args(ContextKind))}"
            )
        if self.block_size < 1:
            raise ConfigError(f"context.block_size: {self.block_size} is not positive; the paper uses 32")

    @property
    def noised_parts(self) -> int:
        """How many noised copies of the sequence are read at once."""
        return 1

    @property
    def parts(self) -> int:
        """How many copies of the sequence the model reads: 2 for [x_t ; x_0], else 1."""
        return self.noised_parts + (self.kind == "block_diffusion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoViews(Context):
    """Block diffusion over [x_tA ; x_tB ; x_0]: two noised copies that share one clean one.

    Neither noised copy sees the other, so each answers as if it had been read alone (design section 4). A
    user never asks for it; complementary views do.
    """

    @property
    def noised_parts(self) -> int:
        """Two."""
        return 2


def may_attend(context: Context, length: int, query: Tensor, key: Tensor) -> Tensor:
    """Say whether `query` may attend to `key` (spec section 1 item 5 for block_diffusion).

    Blocks are counted from the start of each part; the last one may be short. Padding and the samples of a
    pack, which begin at whole blocks, are not considered here: `dense_mask` adds them.

    Args:
        context: kind and block size.
        length: tokens of one part.
        query: int64 positions in [0, parts * length), any shape.
        key: the same, broadcastable against `query`.

    Returns:
        bool tensor of the broadcast shape.
    """
    if context.kind == "bidirectional":
        return (query >= 0) & (key >= 0)
    query_block = query % length // context.block_size
    key_block = key % length // context.block_size
    if context.kind == "block_causal":
        return query_block >= key_block
    query_part, key_part = query // length, key // length
    query_clean, key_clean = query_part == context.noised_parts, key_part == context.noised_parts
    own_noised_block = ~query_clean & (query_part == key_part) & (query_block == key_block)
    clean_before = ~query_clean & key_clean & (query_block > key_block)
    clean_up_to_own = query_clean & key_clean & (query_block >= key_block)
    return own_noised_block | clean_before | clean_up_to_own


def allowed_pairs(context: Context, length: int) -> int:
    """Count the (query, key) pairs that the predicate allows in one sample of `length` real tokens a part."""
    if context.kind == "bidirectional":
        return (context.parts * length) ** 2
    # Whatever its part, a token sees as many keys as stand before its block's end: own block and clean ones.
    size = context.block_size
    ends = [min(start + size, length) for start in range(0, length, size)]
    return context.parts * sum(
        (end - start) * end for start, end in zip(range(0, length, size), ends, strict=True)
    )


def dense_mask(context: Context, length: int, segments: Tensor | None = None) -> Tensor:
    """Render the predicate as a bool mask for SDPA; True where attention is allowed.

    Args:
        context: kind and block size.
        length: tokens of one part.
        segments: [samples, length] int64 (`Segments.numbers`): tokens see those of their own number only. The
            negative ones are padding that nobody sees. A padded query attends to itself alone, so that no
            softmax is empty; its output means nothing. None: all are of one segment, padding too (what the
            reference does for the student).

    Returns:
        [1, 1, S, S] without `segments`, else [samples, 1, S, S], on their device (CPU without them);
        S = parts * length.
    """
    device = None if segments is None else segments.device
    position = torch.arange(context.parts * length, device=device)
    allowed = may_attend(context, length, position[:, None], position[None, :])  # [S, S]
    if segments is None:
        return allowed[None, None]
    own = segments.repeat(1, context.parts)  # [samples, S]
    real = own >= 0
    itself = torch.eye(len(position), dtype=torch.bool, device=device)
    seen = allowed & (own[:, :, None] == own[:, None, :]) & real[:, :, None]
    return (seen | (itself & ~real[:, :, None]))[:, None]
