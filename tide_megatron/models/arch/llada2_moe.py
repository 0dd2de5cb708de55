"""LLaDA2 mixture-of-experts models (spec section 6.2): the teacher of the paper's cross-tokenizer pipeline.

Its router scores experts by a sigmoid, picks by score plus a bias that is no part of the weight, within the
best groups only, then normalises the picked scores and scales them; a shared expert is added unscaled. All of
that is megatron-core's own router, with one difference in meaning: the reference rates a group by its two
best experts, megatron-core by its best `experts per token // kept groups`. Where the two would differ the
config is refused by name. `norm_topk_prob` is not read: the reference normalises always. dFactory's files,
which stack the experts of a layer in one tensor, are read as well. LLaDA2.1 has 2.0's shape and is read;
LLaDA2.2 lets a block of tokens agree on experts first (`expert_capacity`), which is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from tide_megatron.base.errors import ConfigError
from tide_megatron.models.architecture import Architecture, Experts, Names
from tide_megatron.models.hf.config import ConfigReader
from tide_megatron.models.hf.known import FLAG, TEXT, Kinds

_RATED_BY = 2  # experts by whose sum the reference rates a router group (spec section 6.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llada2Moe(Architecture):
    """A decoder whose later layers are mixtures of experts beside one shared expert."""

    model_types: ClassVar[tuple[str, ...]] = ("llada2_moe",)
    names: ClassVar[Names] = Names(
        embedding="model.word_embeddings",
        qkv=("attention.query_key_value",),
        attention_out="attention.dense",
        query_norm="attention.query_layernorm",
        key_norm="attention.key_layernorm",
    )

    harmless: ClassVar[Kinds] = {"norm_topk_prob": FLAG, "router_dtype": TEXT}

    @classmethod
    def read(cls, read: ConfigReader) -> Llada2Moe:
        """Read a config.json; see `Architecture.read`."""
        read.only("use_bias", False, why="biased projections")
        read.only("use_qkv_bias", False, why="biased projections")
        read.only("norm_head", False, why="a normalised head")
        read.only("score_function", "sigmoid", why="another router score")
        read.only("moe_router_enable_expert_bias", True, why="a router without expert bias")
        read.only("expert_capacity", why="block routing: LLaDA2.2 chooses experts by block, not by token")
        read.only("num_nextn_predict_layers", 0, why="layers that predict further tokens")
        read.only("use_rmsnorm", True, why="another norm")
        read.only("using_split_qkv_in_self_attention", False, why="weights of other shapes")
        common = read.common(partly_rotated=True, epsilon=1e-5)
        return cls(
            **common,
            qk_norm=read.get("use_qk_norm", bool, True),
            experts=_read_experts(read, common["layers"]),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json of this model."""
        experts = self.experts
        assert experts is not None, "from_hf always reads experts"
        return {
            **self.source,
            **self.common_hf(),
            "partial_rotary_factor": self.rotary_dim / self.head_dim,
            "use_qk_norm": self.qk_norm,
            "num_experts": experts.number,
            "num_experts_per_tok": experts.per_token,
            "moe_intermediate_size": experts.feed_forward,
            "num_shared_experts": experts.shared_feed_forward // experts.feed_forward,
            "first_k_dense_replace": experts.first_layer,
            "n_group": experts.groups,
            "topk_group": experts.kept_groups,
            "routed_scaling_factor": experts.scale,
        }


def _read_experts(read: ConfigReader, layers: int) -> Experts:
    """Read the mixture's numbers and refuse routers that would not choose as the reference does."""
    number, per_token = read.size("num_experts"), read.size("num_experts_per_tok")
    groups = read.size("n_group", 1)
    kept = read.size("topk_group", groups)
    if number % groups or not kept <= groups:
        raise ConfigError(
            f"config.json: n_group: {groups} groups (topk_group: {kept} of them kept) do not share "
            f"{number} experts evenly"
        )
    if per_token > kept * (number // groups):
        raise ConfigError(
            f"config.json: num_experts_per_tok: {per_token} experts cannot be chosen from "
            f"{kept * (number // groups)} (topk_group {kept} of n_group {groups} groups)"
        )
    if kept < groups and per_token // kept != _RATED_BY:
        raise ConfigError(
            f"config.json: num_experts_per_tok // topk_group: {per_token} // {kept} = {per_token // kept} is "
            "not supported: megatron-core would rate a router group by that many experts, LLaDA2 by its "
            f"{_RATED_BY} best; "
            f"use num_experts_per_tok {_RATED_BY * kept}, or topk_group equal to n_group (no group limit)"
        )
    first = read.get("first_k_dense_replace", int, 0)
    if not 0 <= first < layers:
        raise ConfigError(
            f"config.json: first_k_dense_replace: {first} leaves no mixture among {layers} layers"
        )
    width = read.size("moe_intermediate_size")
    shared = width * read.get("num_shared_experts", int, 0)
    told = f"moe_intermediate_size x num_shared_experts is {shared}"
    read.only("moe_shared_expert_intermediate_size", shared, why=told)
    return Experts(
        number=number,
        per_token=per_token,
        feed_forward=width,
        shared_feed_forward=shared,
        first_layer=first,
        groups=groups,
        kept_groups=kept,
        scale=read.get("routed_scaling_factor", float, 1.0),
        score="sigmoid",
        is_normalised=True,
        has_bias=True,
    )
