"""LLaDA-8B (spec section 6.4): a dense bidirectional decoder with OLMo's names and switches.

Its own code takes other values than ours for most absent keys, so those that decide the mathematics must be
there. Left out, and refused by name: biases, other norms and activations, fewer key-value than query heads.
The published LLaDA-MoE calls itself `llada` too; its config is the one with experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from tide_megatron.base.errors import ConfigError
from tide_megatron.models.arch.llada_moe import LladaMoe
from tide_megatron.models.architecture import Architecture, Names
from tide_megatron.models.hf.config import ConfigReader, HfConfig
from tide_megatron.models.hf.known import FLAG, NUMBER, TEXT, Kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llada(Architecture):
    """A dense decoder with as many key-value as query heads and no head norms."""

    model_types: ClassVar[tuple[str, ...]] = ("llada",)
    names: ClassVar[Names] = Names(
        embedding="model.transformer.wte",
        final_norm="model.transformer.ln_f",
        head="model.transformer.ff_out",
        layer="model.transformer.blocks.{layer}.",
        attention_norm="attn_norm",
        qkv=("q_proj", "k_proj", "v_proj"),
        attention_out="attn_out",
        feed_forward_norm="ff_norm",
        feed_forward=("ff_proj", "up_proj", "ff_out"),
    )
    keys: ClassVar[Mapping[str, str]] = {
        "num_hidden_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
        "hidden_act": "activation_type",
    }

    harmless: ClassVar[Kinds] = {
        "tie_word_embeddings": FLAG,  # `weight_tying` decides
        "attention_layer_norm_with_affine": FLAG,
        "alibi_bias_max": NUMBER,
        "mlp_ratio": NUMBER,
        "init_cutoff_factor": NUMBER,
        "init_device": TEXT,
        "init_fn": TEXT,
        "precision": TEXT,
    }

    @classmethod
    def read(cls, read: ConfigReader) -> Architecture:
        """Read a config.json; see `Architecture.read`."""
        _refuse_other_models(read)
        width, heads = read.size("hidden_size"), read.size("num_attention_heads")
        if width % heads:
            raise ConfigError(f"config.json: d_model: {width} is not a multiple of n_heads {heads}")
        read.only("num_key_value_heads", heads, why="fewer key-value heads")
        read.get("tie_word_embeddings", bool)  # absent means true there
        inner = read.size("mlp_ratio", 4) * width if read.value("intermediate_size") is None else None
        common = read.common(head_dim=width // heads, epsilon=1e-5, feed_forward=inner)
        ids = common["vocabulary"]
        common["vocabulary"] = read.size("embedding_size", ids)
        if common["vocabulary"] < ids:
            raise ConfigError(
                f"config.json: embedding_size: {common['vocabulary']} rows are too few for vocab_size {ids}"
            )
        return cls(**common, qk_norm=False)

    @classmethod
    def from_hf(cls, config: HfConfig) -> Architecture:
        """Read a parsed config.json; the published LLaDA-MoE has this name and another's keys."""
        if "num_experts" in config and "d_model" not in config:
            return LladaMoe.from_hf(config)
        return super().from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json of this model; where the table has more rows than ids, it says both."""
        config = {**self.source, **self.common_hf(), "embedding_size": self.vocabulary}
        config["vocab_size"] = self.source.get("vocab_size", self.vocabulary)
        if "head_dim" not in self.source:
            del config["head_dim"]
        return config


def _refuse_other_models(read: ConfigReader) -> None:
    """Refuse the switches of this family that would make another model."""
    read.must("block_type", "llama", why="blocks of other weights")
    read.must("layer_norm_type", "rms", why="another norm")
    read.must("hidden_act", "silu", why="another activation")
    read.must("rope", True, why="a model without rotary positions")
    read.must("include_bias", False, why="biased projections")
    read.only("include_qkv_bias", False, why="biased projections")
    read.only("bias_for_layer_norm", False, why="biased norms")
    read.only("layer_norm_with_affine", True, why="norms without weights")
    read.only("multi_query_attention", False, why="fewer key-value heads")
    read.only("alibi", False, why="position biases")
    read.only("attention_layer_norm", False, why="norms over whole queries and keys")
    read.only("input_emb_norm", False, why="scaled embeddings")
    read.only("scale_logits", False, why="scaled logits")
    read.only("block_group_size", 1, why="grouped blocks")
    read.only("rope_full_precision", True, why="rotary positions in low precision")
    read.only("clip_qkv", why="clipped queries, keys and values")
