"""Who may attend to whom: one predicate per context kind, from which every rendering is made.

A dense bool mask is rendered here (SDPA on CPU, tests); `models/attention.py` renders the same predicate as
a FlexAttention BlockMask and in structured form; `diffusion/denoise.py` as a key-value plan for sampling.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from torch import Tensor

from tide_megatron.base.errors import ConfigError, nearest

ContextKind = Literal["bidirectional", "block_causal", "block_diffusion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """A context kind with its block size in tokens (ignored by `bidirectional`)."""

    kind: ContextKind
    block_size: int = 32

    def __post_init__(self) -> None:
        """Refuse unknown kinds and empty blocks."""
        if self.kind not in get_args(ContextKind):
            raise ConfigError(f"context.kind: {self.kind!r} is unknown; {nearest(self.kind, get_args(ContextKind))}")
        if self.block_size < 1:
            raise ConfigError(f"context.block_size: {self.block_size} is not positive; the paper uses 32")

    @property
    def parts(self) -> int:
        """How many copies of the sequence the model reads: 2 for [x_t ; x_0], else 1."""
        return 2 if self.kind == "block_diffusion" else 1


def may_attend(context: Context, length: int, query: Tensor, key: Tensor) -> Tensor:
    """Say whether `query` may attend to `key` (spec section 1 item 5 for block_diffusion).

    Args:
        context: kind and block size.
        length: tokens of one part.
        query: int64 positions in [0, parts * length), any shape.
        key: the same, broadcastable against `query`.

    Returns:
        bool tensor of the broadcast shape.
    """
    raise AssertionError("contract stub: the diffusion layer fills this in")
