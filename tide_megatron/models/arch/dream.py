"""Dream-7B (spec section 6.4): Qwen2.5's decoder, read without a causal mask.

It was continued from an autoregressive model and still predicts one token ahead: the state at a position
predicts the token behind it. Only `TideModel` acts on that (`View.shifted`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from tide_megatron.models.architecture import Architecture
from tide_megatron.models.hf.config import ConfigReader
from tide_megatron.models.hf.known import FLAG, Kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dream(Architecture):
    """A dense decoder with biased query, key and value projections and no head norms."""

    model_types: ClassVar[tuple[str, ...]] = ("Dream",)

    harmless: ClassVar[Kinds] = {"full_attn_mask": FLAG, "attention_bias": FLAG}
    """Its own code reads neither."""

    @classmethod
    def read(cls, read: ConfigReader) -> Dream:
        """Read a config.json; see `Architecture.read`."""
        read.only("use_mrope", False, why="rotary positions of several axes")
        return cls(**read.common(), qk_norm=False, qkv_bias=True, is_shifted=True)

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json of this model."""
        return {**self.source, **self.common_hf()}
