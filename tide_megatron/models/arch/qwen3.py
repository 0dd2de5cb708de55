"""Qwen3-shaped dense models (spec sections 6.1, 6.3): the A2D diffusion student, plain Qwen3, SDAR, WeDLM.

They differ in name, not in mathematics: A2D and SDAR took Qwen3's weights and dropped the causal mask, and
WeDLM has Qwen3's modules with two switches. Who may attend to whom is not the architecture's affair but the
context's. Left out: Qwen3's output bias (`attention_bias` there covers the output projection as well, which
megatron-core's spec cannot do without biasing every layer); WeDLM's covers query, key and value only.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from tide_megatron.base.errors import ConfigError
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.hf.config import ConfigReader

_QWEN3_HEAD_DIM = 128  # what transformers takes when config.json has no head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3(Architecture):
    """A dense decoder with query and key norms and an explicit head dimension."""

    model_types: ClassVar[tuple[str, ...]] = ("a2d-qwen3", "qwen3", "sdar", "wedlm")

    @classmethod
    def read(cls, read: ConfigReader) -> Qwen3:
        """Read a config.json; see `Architecture.read`."""
        is_wedlm = read.get("model_type", str) == "wedlm"
        bias = read.get("attention_bias", bool, is_wedlm)
        if bias and not is_wedlm:
            raise ConfigError(
                "config.json: attention_bias: True is not supported (a bias on the output projection)"
            )
        return cls(
            **read.common(head_dim=None if is_wedlm else _QWEN3_HEAD_DIM),
            qk_norm=read.get("qk_norm", bool, not is_wedlm),
            qkv_bias=bias,
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json of this model."""
        config = {**self.source, **self.common_hf(), "attention_bias": self.qkv_bias}
        if self.model_type == "wedlm" or not self.qk_norm:
            config["qk_norm"] = self.qk_norm
        return config
