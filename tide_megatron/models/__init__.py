"""Models on megatron-core's GPTModel: what they are, how they are built, how weights come and go."""

from __future__ import annotations

from tide_megatron.models.arch import ARCHITECTURES
from tide_megatron.models.architecture import Architecture

__all__ = ["ARCHITECTURES", "Architecture"]
