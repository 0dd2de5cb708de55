"""The architectures, one file each."""

from __future__ import annotations

from tide_megatron.models.arch.dream import Dream
from tide_megatron.models.arch.llada import Llada
from tide_megatron.models.arch.llada2_moe import Llada2Moe
from tide_megatron.models.arch.llada_moe import LladaMoe
from tide_megatron.models.arch.qwen3 import Qwen3
from tide_megatron.models.architecture import Architecture

_CLASSES = (
    Qwen3,
    Llada2Moe,
    Llada,
    LladaMoe,
    Dream,
)

ARCHITECTURES: dict[str, type[Architecture]] = {word: one for one in _CLASSES for word in one.model_types}
"""`model_type` of config.json -> the class that reads it."""
