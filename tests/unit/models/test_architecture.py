"""Configs: read, written back, and refused by name where the mathematics would differ."""

import pytest

from tests.unit.models.shapes import DENSE, MIXTURE, architecture
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
    "config", [DENSE, MIXTURE, WEDLM, {**WEDLM, "attention_bias": True, "qk_norm": False}]
)
def test_config_goes_there_and_back(config):
    read = architecture(config)
    written = read.to_hf()
    assert type(read).from_hf(written) == read
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


def test_rotary_base_of_newer_configs():
    new = {key: value for key, value in DENSE.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert architecture(new).rotary_base == 5e5
    with pytest.raises(ConfigError, match="rope_type: 'yarn'"):
        architecture(new, rope_parameters={"rope_type": "yarn", "rope_theta": 5e5})


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
