"""A made-up family: Qwen's decoder without head norms, under names and keys of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from tide_megatron.models.architecture import Architecture, Names
from tide_megatron.models.hf.config import ConfigReader


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeUp(Architecture):
    """A dense decoder."""

    model_types: ClassVar[tuple[str, ...]] = ("made-up",)
    names: ClassVar[Names] = Names(
        embedding="tokens",
        head="scores",
        layer="blocks.{layer}.",
        qkv=("attention.qkv",),
        attention_out="attention.out",
    )
    keys: ClassVar[Mapping[str, str]] = {"hidden_size": "width", "num_hidden_layers": "depth"}

    @classmethod
    def read(cls, read: ConfigReader) -> MadeUp:
        """Read a config.json; see `Architecture.read`."""
        read.only("soft_cap", why="capped logits")
        return cls(**read.common(), qk_norm=False)

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json of this model."""
        return {**self.source, **self.common_hf()}
