"""LLaDA-MoE (spec section 6.4): mixtures of experts under a plain softmax router.

The weights of the chosen experts are their shares of the softmax over ALL experts and are not made to sum to
one; the reference hard-codes that. Published files call the model `llada`, like LLaDA-8B; the reference asks
for `lladamoe`. Both are read. Left out, and refused by name: router groups, a router bias, other scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from tide_megatron.base.errors import ConfigError
from tide_megatron.models.architecture import Architecture, Experts, Names
from tide_megatron.models.hf.config import ConfigReader
from tide_megatron.models.hf.values import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class LladaMoe(Architecture):
    """A decoder whose later layers, usually all, are mixtures, perhaps beside one shared expert."""

    model_types: ClassVar[tuple[str, ...]] = ("lladamoe",)
    names: ClassVar[Names] = Names(
        shared_expert=("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")
    )
    keys: ClassVar[Mapping[str, str]] = {"intermediate_size": "dense_intermediate_size"}

    @classmethod
    def read(cls, read: ConfigReader) -> LladaMoe:
        """Read a config.json; see `Architecture.read`."""
        read.only("attention_bias", False, why="biased projections")
        read.only("clip_qkv", why="clipped queries, keys and values")
        read.only("moe_router_score_function", "softmax", why="another router score")
        read.only("moe_router_enable_expert_bias", False, why="a router bias")
        read.only("norm_topk_prob", False, why="normalised routing weights")
        read.only("routed_scaling_factor", 1, why="scaled routing weights")
        read.only("router_num_group", why="router groups")
        read.only("router_topk_group", why="router groups")
        common = read.common(epsilon=1e-5)
        return cls(
            **common,
            qk_norm=read.get("qk_layernorm", bool, True),
            experts=_read_experts(read, common["layers"]),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json of this model."""
        experts = self.experts
        assert experts is not None, "from_hf always reads experts"
        return {
            **self.source,
            **self.common_hf(),
            "qk_layernorm": self.qk_norm,
            "num_experts": experts.number,
            "num_experts_per_tok": experts.per_token,
            "expert_intermediate_size": experts.feed_forward,
            "shared_expert_intermediate_size": experts.shared_feed_forward or None,
            "moe_layer_freq": [int(self.is_mixture(layer)) for layer in range(self.layers)],
        }


def _read_experts(read: ConfigReader, layers: int) -> Experts:
    """Read the mixture's numbers."""
    number, per_token = read.size("num_experts"), read.size("num_experts_per_tok")
    if per_token > number:
        raise ConfigError(
            f"config.json: num_experts_per_tok: {per_token} experts cannot be chosen from {number}"
        )
    kinds = read.value("moe_layer_freq")
    kinds = [1] * layers if kinds is None else kinds
    first = kinds.index(1) if isinstance(kinds, list) and 1 in kinds else layers
    if kinds != [0] * first + [1] * (layers - first) or first == layers:
        raise ConfigError(
            f"config.json: moe_layer_freq: {shown(kinds)} is not supported; only a list with 0 for the first "
            f"layers, if any, and 1 for the others of the {layers} layers is"
        )
    return Experts(
        number=number,
        per_token=per_token,
        feed_forward=read.size("expert_intermediate_size"),
        shared_feed_forward=read.get("shared_expert_intermediate_size", int, 0),
        first_layer=first,
        groups=1,
        kept_groups=1,
        scale=1.0,
        score="softmax",
        is_normalised=False,
        has_bias=False,
    )
