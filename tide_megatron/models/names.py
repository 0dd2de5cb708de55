"""How Hugging Face files name an architecture's weights: what a new one says, beside reading its config."""

from __future__ import annotations

import dataclasses

Gated = tuple[str, str, str]
"""Names of the gate, up and down projections of a gated feed-forward block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Hugging Face names without `.weight` or `.bias`; the defaults are those of Qwen's and most later files.

    Names inside a layer are relative to `layer`.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{layer}."
    """Prefix of a layer; `{layer}` is its number."""
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Query, key, value; or one name where they are one matrix: all queries, all keys, all values."""
    attention_out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    feed_forward_norm: str = "post_attention_layernorm"
    feed_forward: Gated = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    router: str = "mlp.gate"
    router_bias: str = "mlp.gate.expert_bias"
    """In full."""
    expert: Gated = (
        "mlp.experts.{expert}.gate_proj",
        "mlp.experts.{expert}.up_proj",
        "mlp.experts.{expert}.down_proj",
    )
    """`{expert}` is the expert's number."""
    merged_experts: Gated = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
    """In full: tensors of all experts of a layer, stacked along a first axis, as some files have them."""
    shared_expert: Gated = (
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
        "mlp.shared_experts.down_proj",
    )
