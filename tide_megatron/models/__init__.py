"""Models on megatron-core's GPTModel: what they are, how they are built, how weights come and go."""

from __future__ import annotations

from tide_megatron.models.architecture import Architecture
from tide_megatron.models.dream import Dream
from tide_megatron.models.llada import Llada
from tide_megatron.models.llada2_moe import Llada2Moe
from tide_megatron.models.llada_moe import LladaMoe
from tide_megatron.models.qwen3 import Qwen3

ARCHITECTURES: dict[str, type[Architecture]] = {
    model_type: kind for kind in (Qwen3, Llada2Moe, Llada, LladaMoe, Dream) for model_type in kind.model_types
}
"""`model_type` of config.json -> the class that reads it."""

__all__ = ["ARCHITECTURES", "Architecture"]
