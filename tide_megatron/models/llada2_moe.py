"""LLaDA2 mixture-of-experts models (spec section 6.2): the teacher of the paper's cross-tokenizer pipeline.

Its router scores experts by a sigmoid, picks by score plus a bias that is no part of the weight, within the
best groups only, then normalises the picked scores and scales them; a shared expert is added unscaled. All of
that is megatron-core's own router, with one difference in meaning: the reference rates a group by its two
best experts, megatron-core by its best `experts per token // kept groups`. Where the two would differ the
config is refused by name. `norm_topk_prob` is not read: the reference normalises always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from tide_megatron.base.errors import ConfigError
from tide_megatron.models.architecture import (
    Architecture,
    Experts,
    HfConfig,
    Reader,
    feed_forward_pieces,
)
from tide_megatron.models.weights import EXPERT, Copy, Piece

_RATED_BY = 2  # experts by whose sum the reference rates a router group (spec section 6.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llada2Moe(Architecture):
    """A decoder whose later layers are mixtures of experts beside one shared expert."""

    model_types: ClassVar[tuple[str, ...]] = ("llada2_moe",)
    embedding_name: ClassVar[str] = "model.word_embeddings.weight"

    @classmethod
    def from_hf(cls, config: HfConfig) -> Llada2Moe:
        """Read a parsed config.json; see `Architecture.from_hf`."""
        read = Reader(config)
        read.only("use_bias", False, why="biased projections")
        read.only("use_qkv_bias", False, why="biased projections")
        read.only("norm_head", False, why="a normalised head")
        read.only("score_function", "sigmoid", why="another router score")
        read.only("moe_router_enable_expert_bias", True, why="a router without expert bias")
        common = read.common()
        return cls(
            **common,
            rotary_dim=int(common["head_dim"] * read.get("partial_rotary_factor", float, 1.0)),
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

    def attention_names(self, layer: str) -> Mapping[str, str]:
        """Name the attention weights (spec section 6.5)."""
        own = f"{layer}attention."
        return {
            "qkv": f"{own}query_key_value",
            "out": f"{own}dense",
            "q_norm": f"{own}query_layernorm",
            "k_norm": f"{own}key_layernorm",
        }

    def mlp_pieces(self, layer: int, ours: str, theirs: str) -> list[Piece]:
        """List the weights of one feed-forward layer, dense or mixture."""
        experts = self.experts
        if experts is None or not self.is_mixture(layer):
            return feed_forward_pieces(ours, theirs, self.hidden, self.feed_forward)
        router = (experts.number, self.hidden)
        bias = Copy.of(
            f"{ours}router.expert_bias", f"{theirs}gate.expert_bias", router[:1], fill=0.0, is_parameter=False
        )
        found: list[Piece] = [Copy.of(f"{ours}router.weight", f"{theirs}gate.weight", router), bias]
        for expert in range(experts.number):
            found += feed_forward_pieces(
                f"{ours}experts.local_experts.{EXPERT}.",
                f"{theirs}experts.{expert}.",
                self.hidden,
                experts.feed_forward,
                expert,
            )
        if experts.shared_feed_forward:
            width = experts.shared_feed_forward
            found += feed_forward_pieces(
                f"{ours}shared_experts.", f"{theirs}shared_experts.", self.hidden, width
            )
        return found


def _read_experts(read: Reader, layers: int) -> Experts:
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
    return Experts(
        number=number,
        per_token=per_token,
        feed_forward=width,
        shared_feed_forward=width * read.get("num_shared_experts", int, 0),
        first_layer=first,
        groups=groups,
        kept_groups=kept,
        scale=read.get("routed_scaling_factor", float, 1.0),
    )
