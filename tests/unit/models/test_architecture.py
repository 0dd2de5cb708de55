"""Configs: read, written back, and refused by name where the mathematics would differ."""

import pytest

from tests.unit.models.shapes import DENSE, DREAM, LLADA, LLADA_MOE, MIXTURE, architecture
from tide_megatron.base.errors import ConfigError
from tide_megatron.models import ARCHITECTURES

WEDLM = {
    **DENSE,
    "model_type": "wedlm",
    "attention_bias": False,
    "qk_norm": True,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        MIXTURE,
        WEDLM,
        {**WEDLM, "attention_bias": True, "qk_norm": False},
        DREAM,
        LLADA,
        {**LLADA, "weight_tying": True},
        LLADA_MOE,
        {**LLADA_MOE, "model_type": "llada", "qk_layernorm": False},
    ],
)
def test_config_goes_there_and_back(config):
    read = architecture(config)
    written = read.to_hf()
    assert architecture(written) == read
    assert {key: written[key] for key in config} == config, "keys we do not read are handed back as well"


def test_all_model_types_are_in_the_table():
    assert set(ARCHITECTURES) == {
        "a2d-qwen3",
        "qwen3",
        "sdar",
        "wedlm",
        "llada2_moe",
        "llada",
        "lladamoe",
        "Dream",
    }


def test_shape_facts():
    dense, mixture = architecture(DENSE), architecture(MIXTURE)
    assert (dense.head_dim, dense.rotary_dim, dense.tied, dense.num_experts) == (16, 16, True, 0)
    assert (mixture.rotary_dim, mixture.num_experts, mixture.is_mixture(0), mixture.is_mixture(1)) == (
        8,
        8,
        False,
        True,
    )
    assert mixture.experts.shared_feed_forward == 24


def test_defaults_are_those_of_each_family():
    no_dim = {key: value for key, value in DENSE.items() if key != "head_dim"}
    assert architecture(no_dim).head_dim == 128
    wedlm = architecture({**no_dim, "model_type": "wedlm"})
    assert (wedlm.head_dim, wedlm.qk_norm, wedlm.qkv_bias) == (8, False, True)
    assert architecture(DENSE).qk_norm


def test_facts_of_further_families():
    llada, mixture, dream = (architecture(config) for config in (LLADA, LLADA_MOE, DREAM))
    assert (llada.vocabulary, llada.head_dim, llada.rotary_dim, llada.qk_norm) == (61, 8, 8, False)
    assert architecture(LLADA, embedding_size=None).vocabulary == 59
    assert architecture(LLADA, mlp_hidden_size=None, mlp_ratio=3).feed_forward == 96
    assert architecture(LLADA, weight_tying=True).ignores("model.transformer.ff_out.weight")
    assert not llada.ignores("model.transformer.ff_out.weight")
    assert (mixture.feed_forward, mixture.experts.feed_forward, mixture.experts.shared_feed_forward) == (
        80,
        24,
        40,
    )
    assert [mixture.is_mixture(layer) for layer in range(3)] == [False, True, True]
    assert (mixture.experts.score, mixture.experts.is_normalised, mixture.experts.has_bias) == (
        "softmax",
        False,
        False,
    )
    assert (dream.qkv_bias, dream.qk_norm, dream.is_shifted) == (True, False, True)
    assert not any(read.is_shifted for read in (llada, mixture, architecture(DENSE), architecture(MIXTURE)))


def test_published_llada_moe_calls_itself_llada():
    assert type(architecture(LLADA_MOE, model_type="llada")) is ARCHITECTURES["lladamoe"]
    assert type(architecture(LLADA)) is ARCHITECTURES["llada"]


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (DENSE, "use_sliding_window", True),
        (DENSE, "rope_scaling", {"type": "linear", "factor": 2.0}),
        (DENSE, "hidden_act", "gelu"),
        (DENSE, "attention_dropout", 0.1),
        (DENSE, "layer_types", ["full_attention", "sliding_attention"]),
        (DENSE, "attention_bias", True),
        (DENSE, "hidden_size", None),
        (DENSE, "hidden_size", "32"),
        (DENSE, "hidden_size", True),
        (DENSE, "num_hidden_layers", 0),
        (DENSE, "num_key_value_heads", 3),
        (DENSE, "tie_word_embeddings", "yes"),
        (MIXTURE, "use_qkv_bias", True),
        (MIXTURE, "use_bias", True),
        (MIXTURE, "norm_head", True),
        (MIXTURE, "score_function", "softmax"),
        (MIXTURE, "embedding_dropout", 0.1),
        (MIXTURE, "output_dropout", 0.1),
        (MIXTURE, "partial_rotary_factor", 0.05),
        (MIXTURE, "n_group", 3),
        (MIXTURE, "first_k_dense_replace", 3),
        (MIXTURE, "num_experts_per_tok", 5),
        *((LLADA, key, None) for key in ("block_type", "layer_norm_type", "activation_type", "weight_tying")),
        *((LLADA, key, None) for key in ("rope", "include_bias", "rope_theta", "n_layers")),
        (LLADA, "block_type", "sequential"),
        (LLADA, "layer_norm_type", "default"),
        (LLADA, "activation_type", "swiglu"),
        (LLADA, "rope", False),
        (LLADA, "include_bias", True),
        (LLADA, "include_qkv_bias", True),
        (LLADA, "bias_for_layer_norm", True),
        (LLADA, "layer_norm_with_affine", False),
        (LLADA, "multi_query_attention", True),
        (LLADA, "n_kv_heads", 2),
        (LLADA, "alibi", True),
        (LLADA, "attention_layer_norm", True),
        (LLADA, "input_emb_norm", True),
        (LLADA, "scale_logits", True),
        (LLADA, "block_group_size", 2),
        (LLADA, "rope_full_precision", False),
        (LLADA, "clip_qkv", 8.0),
        (LLADA, "residual_dropout", 0.1),
        (LLADA, "embedding_size", 58),
        (LLADA, "d_model", 30),
        (LLADA_MOE, "attention_bias", True),
        (LLADA_MOE, "clip_qkv", 8.0),
        (LLADA_MOE, "partial_rotary_factor", 0.5),
        (LLADA_MOE, "moe_router_score_function", "sigmoid"),
        (LLADA_MOE, "moe_router_enable_expert_bias", True),
        (LLADA_MOE, "norm_topk_prob", True),
        (LLADA_MOE, "routed_scaling_factor", 2.5),
        (LLADA_MOE, "router_num_group", 4),
        (LLADA_MOE, "router_topk_group", 2),
        (LLADA_MOE, "num_experts_per_tok", 9),
        (LLADA_MOE, "moe_layer_freq", [1, 0, 1]),
        (LLADA_MOE, "moe_layer_freq", [0, 0, 0]),
        (LLADA_MOE, "moe_layer_freq", [1, 1]),
        (LLADA_MOE, "moe_layer_freq", 1),
        (DREAM, "use_sliding_window", True),
        (DREAM, "hidden_act", "gelu"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config, key, value):
    with pytest.raises(ConfigError, match=rf"config\.json: .*{key}|config\.json: {key}"):
        architecture(config, **{key: value})


@pytest.mark.parametrize(("per_token", "kept"), [(4, 1), (2, 2), (1, 1), (3, 3)])
def test_router_groups_rated_otherwise_are_refused(per_token, kept):
    with pytest.raises(ConfigError, match=r"num_experts_per_tok"):
        architecture(MIXTURE, num_experts=16, num_experts_per_tok=per_token, topk_group=kept)


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_that_are_all_kept_are_no_limit(groups):
    read = architecture(MIXTURE, num_experts_per_tok=3, n_group=groups, topk_group=groups)
    assert read.experts.groups == read.experts.kept_groups
