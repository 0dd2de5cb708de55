"""config.json as transformers reads it: facts that moved, keys nobody knows, another type in every key."""

import itertools
import json

import pytest
import torch
from transformers import AutoConfig, GlmConfig
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from bench.shapes import LLADA2_MINI
from tests.unit.models.shapes import DENSE, DREAM, LLADA, LLADA_MOE, MIXTURE, architecture
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.models.weights import read_architecture

TOP = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters")
PLAIN = {"rope_type": "default"}
BASE = {"rope_theta": 6e5}
HALF = {"partial_rotary_factor": 0.5}
"""What the rotary facts may look like."""


def config_of(whole, rotary):
    """Return a config whose only rotary facts are these."""
    return {key: value for key, value in whole.items() if key not in TOP} | rotary


def frequencies(read):
    dims = torch.arange(0, read.rotary_dim, 2, dtype=torch.float32)
    return 1.0 / read.rotary_base ** (dims / read.rotary_dim)


def folder_of(config, path):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


WHOLE_HEADS = [
    BASE,
    {**BASE, "rope_scaling": None},
    {**BASE, "rope_scaling": {}},
    {**BASE, "rope_scaling": PLAIN},
    {**BASE, "rope_scaling": {"type": "default"}},
    {**BASE, "rope_parameters": None},
    {**BASE, "rope_parameters": PLAIN},
    {"rope_parameters": {**PLAIN, **BASE}},
    {"rope_parameters": BASE},
    {"rope_parameters": {"type": "default", **BASE}},
    {**BASE, "rope_parameters": {**PLAIN, **BASE}},
    {"rope_scaling": {**PLAIN, **BASE}, "rope_parameters": {**PLAIN, **BASE}},
    {**BASE, "rope_scaling": PLAIN, "rope_parameters": {**PLAIN, **BASE}},
    {"rope_scaling": {}, "rope_parameters": {**PLAIN, **BASE}},
    {"rope_parameters": {**PLAIN, "rope_theta": 600000}},
]


@pytest.mark.parametrize("rotary", WHOLE_HEADS, ids=str)
def test_rotary_facts_of_whole_heads_are_those_transformers_reads(rotary, tmp_path):
    config = config_of(DENSE, rotary) | {"model_type": "qwen3"}
    folder = folder_of(config, tmp_path / "m")
    theirs = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    torch.testing.assert_close(frequencies(read_architecture(folder)), theirs, rtol=1e-6, atol=0)


PARTS_OF_HEADS = [
    {**BASE, **HALF},
    {"rope_parameters": {**PLAIN, **BASE, **HALF}},  # read as a whole head before
    {**BASE, "rope_parameters": {**PLAIN, **HALF}},
    {**HALF, "rope_parameters": {**PLAIN, **BASE}},
    {**HALF, "rope_scaling": {"type": "default", **BASE}},
    {**BASE, **HALF, "rope_parameters": {**PLAIN, **BASE, **HALF}},
    {**BASE, "partial_rotary_factor": 1, "rope_scaling": PLAIN},
    {**BASE, "partial_rotary_factor": 0.25, "rope_scaling": None, "rope_parameters": None},
]


@pytest.mark.parametrize("rotary", PARTS_OF_HEADS, ids=str)
def test_rotary_facts_of_parts_of_heads_are_those_transformers_reads(rotary):
    """Its GLM is a model of its own with partly rotated heads; LLaDA2's code is not part of it."""
    config = config_of(MIXTURE, rotary)
    shape = {key: config[key] for key in ("hidden_size", "num_attention_heads", "head_dim")}
    theirs = GlmRotaryEmbedding(GlmConfig(**shape, **json.loads(json.dumps(rotary)))).inv_freq
    torch.testing.assert_close(frequencies(architecture(config)), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rotary", "told"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", **BASE, "factor": 4.0}},
            r"rope_parameters\.rope_type: 'yarn'",
        ),
        ({"rope_parameters": {"factor": 4.0, "type": "yarn", **BASE}}, r"rope_parameters\.type: 'yarn'"),
        ({**BASE, "rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.type: 'linear'"),
        ({**BASE, "rope_scaling": {"rope_type": "default", "type": "yarn"}}, r"rope_scaling\.type: 'yarn'"),
        ({**BASE, "rope_scaling": {"rope_type": ["default"]}}, r"rope_scaling\.rope_type: \['default'\]"),
        ({**BASE, "rope_scaling": {"mrope_section": [2, 3, 3]}}, r"rope_scaling\.mrope_section: \[2, 3, 3\]"),
        ({**BASE, "rope_scaling": {"type": "default", "factor": 8}}, r"rope_scaling\.factor: 8"),
        ({**BASE, "rope_scaling": "linear"}, r"rope_scaling: 'linear' is not an object"),
        ({**BASE, "rope_parameters": [1]}, r"rope_parameters: \[1\] is not an object"),
        (
            {**BASE, "rope_parameters": {"full_attention": {**PLAIN, **BASE}}},
            r"rope_parameters\.full_attention",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {**PLAIN, **BASE},
                    "sliding_attention": {"rope_theta": 1e4},
                }
            },
            r"rope_parameters\.full_attention: .* by kind of layer",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": BASE},
            r"rope_theta: 10000 in the top level, 600000 in rope_par",
        ),
        (
            {"rope_scaling": {"rope_theta": 1e4}, "rope_parameters": BASE},
            "10000 in rope_scaling, 600000 in rope_p",
        ),
        (
            {**BASE, **HALF, "rope_parameters": {"partial_rotary_factor": 1}},
            "partial_rotary_factor: 0.5 in the top",
        ),
        (
            {"rope_scaling": PLAIN, "rope_parameters": BASE},
            "rope_theta: 600000 stands only in rope_parameters",
        ),
        ({}, "rope_theta is missing"),
        ({"rope_parameters": PLAIN}, "rope_theta is missing"),
        ({"rope_theta": "1e4"}, "rope_theta: '1e4' is not a number"),
        ({"rope_theta": True}, "rope_theta: True is not a number"),
        ({"rope_theta": float("nan")}, "rope_theta: nan is not a number"),
        ({"rope_theta": 0}, "rope_theta: 0 must be above 0"),
        (
            {"rope_parameters": {"rope_theta": [1e4]}},
            r"rope_parameters\.rope_theta: \[10000.0\] is not a number",
        ),
        ({**BASE, "partial_rotary_factor": 1.5}, "partial_rotary_factor: 1.5"),
        ({**BASE, "partial_rotary_factor": 0}, "partial_rotary_factor: 0 "),
        ({**BASE, "rotary_dim": 4, **HALF}, "rotary_dim: 4 is not supported .* make it 8"),
        (BASE, "partial_rotary_factor is missing"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_rotary_facts_that_are_unknown_or_disagree_are_refused(rotary, told):
    with pytest.raises(ConfigError, match=told):
        architecture(
            config_of(MIXTURE, {**HALF, **rotary} if "missing" in told and rotary != BASE else rotary)
        )


@pytest.mark.parametrize("whole", [DENSE, DREAM, LLADA, LLADA_MOE], ids=lambda config: config["model_type"])
def test_a_family_of_whole_heads_refuses_a_part_wherever_it_is_told(whole):
    for rotary in ({**BASE, **HALF}, {"rope_parameters": {**BASE, **HALF}}):
        with pytest.raises(ConfigError, match=r"partial_rotary_factor: 0\.5 is not supported"):
            architecture(config_of(whole, rotary))
    assert architecture(config_of(whole, {**BASE, "partial_rotary_factor": 1.0})).rotary_base == 6e5


LLADA21_MINI = {
    **LLADA2_MINI,
    "architectures": ["LLaDA2MoeModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
    **dict.fromkeys(("attention_dropout", "embedding_dropout", "output_dropout"), 0.0),
    **dict.fromkeys(("norm_head", "use_bias", "use_qkv_bias", "use_sliding_window", "use_cache"), False),
    **dict.fromkeys(("use_qk_norm", "use_rmsnorm", "norm_topk_prob", "moe_router_enable_expert_bias"), True),
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 20,
    "moe_shared_expert_intermediate_size": 512,
    "num_nextn_predict_layers": 0,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "rope_scaling": None,
    "rotary_dim": 64,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
}
"""Pieced together from what public engines show of it: 2.0's shape, 32,768 positions, the words around it."""


def test_the_model_that_followed_in_the_same_shape_is_read():
    read, known = architecture(LLADA21_MINI), architecture(LLADA2_MINI)
    assert read == known
    assert (read.rotary_dim, read.max_positions, read.experts.shared_feed_forward) == (64, 32768, 512)


@pytest.mark.parametrize(
    ("whole", "key", "value"),
    [
        (LLADA21_MINI, "expert_capacity", 64),  # LLaDA2.2
        (LLADA21_MINI, "num_nextn_predict_layers", 1),
        (LLADA21_MINI, "moe_shared_expert_intermediate_size", 1024),
        (LLADA21_MINI, "use_rmsnorm", False),
        (LLADA21_MINI, "use_block_routing", True),
        (LLADA21_MINI, "rotary_dim", 128),
        (LLADA21_MINI, "layer_group_size", 4),
        (LLADA21_MINI, "num_local_experts", 256),
        (DENSE, "attn_logit_softcapping", 50.0),
        (DENSE, "no_rope_layers", [1, 0]),
        (DENSE, "query_pre_attn_scalar", 256),
        (DENSE, "quantization_config", {"quant_method": "fp8"}),
        (DENSE, "transformers_weights", "other.safetensors"),
        (DENSE, "text_config", {"hidden_size": 64}),
        (DENSE, "mlp_bias", True),
        (DENSE, "per_layer_config", {"0": {"head_dim": 8}}),
        (DREAM, "use_mrope", True),
        (LLADA, "hidden_size", 64),  # its own key says 32
        (LLADA, "ff_gate", "relu"),
        (LLADA_MOE, "intermediate_size", 81),
    ],
)
def test_a_key_that_may_change_the_mathematics_is_known_or_refused(whole, key, value):
    with pytest.raises(ConfigError, match=rf"config\.json: {key}: ") as caught:
        architecture(whole, **{key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("whole", "more"),
    [
        (
            LLADA21_MINI,
            {"expert_capacity": None, "block_size": 32, "delete_token_id": 5, "split_token_id": 6},
        ),
        (LLADA21_MINI, {"use_block_routing": False, "multi_gate": False, "mtp_loss_scaling_factor": 0}),
        (DENSE, {"layer_types": ["full_attention"] * 2, "sliding_window": 4096, "max_window_layers": 28}),
        (DENSE, {"_name_or_path": "a/b", "_commit_hash": "1", "mask_token_id": 3, "eos_token_id": [1, 2]}),
        (DENSE, {"temperature": 0.7, "do_sample": True, "max_length": 20, "bad_words_ids": None}),
        (DENSE, {"block_size": 4, "fuse_cross_entropy": True, "ep_size": 1, "debug": False}),
        (DENSE, {"dtype": "bfloat16", "torch_dtype": "bfloat16", "id2label": {"0": "a"}, "pruned_heads": {}}),
        (DREAM, {"full_attn_mask": True, "attention_bias": False, "use_mrope": False}),
        (
            LLADA,
            {"tie_word_embeddings": True, "hidden_size": 32, "alibi_bias_max": 8.0, "precision": "amp_bf16"},
        ),
        (LLADA_MOE, {"router_aux_loss_coef": 0.01, "norm_topk_prob": None, "intermediate_size": 80}),
    ],
)
def test_keys_that_change_nothing_are_accepted_and_handed_back(whole, more):
    read = architecture(whole, **more)
    assert read == architecture(whole)
    assert {key: read.to_hf()[key] for key in more} == more


ODD = [
    [],
    ["x"],
    {},
    {"a": 1},
    "",
    "odd",
    "1",
    True,
    False,
    0,
    -1,
    2.5,
    10**30,
    float("nan"),
    float("inf"),
    [[1]],
]
TYPED = [
    LLADA21_MINI | {"rope_scaling": PLAIN, "eos_token_id": 7, "mask_token": "<|mask|>"},
    DENSE
    | {"model_type": "qwen3", "layer_types": ["full_attention"] * 2, "attention_bias": False, "qk_norm": True}
    | {"top_p": 0.5, "use_sliding_window": False, "max_position_embeddings": 512, "initializer_range": 0.02},
    DREAM | {"hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "use_mrope": False},
    LLADA
    | {"alibi": False, "mlp_ratio": 4, "block_group_size": 1, "init_fn": "mitchell", "scale_logits": False},
    LLADA_MOE | {"norm_topk_prob": False, "router_aux_loss_coef": 0.01, "attention_bias": False},
]


def kind(value):
    """Return a value's type in JSON."""
    return "number" if type(value) in (int, float) else type(value).__name__


@pytest.mark.parametrize("whole", TYPED, ids=lambda config: config["model_type"])
def test_another_type_in_any_key_is_one_line_with_key_value_and_remedy(whole):
    layers = architecture(whole).layers
    for key, odd in itertools.product(whole.keys() - {"model_type"}, ODD):
        free = (key.endswith("_token_id") and isinstance(odd, list)) or (
            key.endswith("_token") and isinstance(odd, dict)
        )
        try:
            again = architecture(whole, **{key: odd})
        except ConfigError as refused:
            told = str(refused)
            assert told.startswith("config.json: "), told
            assert key in told, (key, odd, told)
            assert "\n" not in told, told
            assert len(told) < 300, told
        else:
            assert free or kind(odd) == kind(whole[key]), f"{key}: {odd!r} was accepted"
            assert again.layers == layers, "no odd number is a count of layers"


def test_null_is_absent_in_every_key():
    whole = TYPED[1]
    for key in whole.keys() - {"model_type"}:
        absent = {other: value for other, value in whole.items() if other != key}
        assert outcome(whole | {key: None}) == outcome(absent), key


def outcome(config):
    try:
        return architecture(config)
    except ConfigError as refused:
        return str(refused)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"model_type": ["qwen3"]}', r"model_type: \['qwen3'\] is not supported"),
        ('{"model_type": {"a": 1}}', "model_type: {'a': 1} is not supported"),
        ('{"model_type": 3}', "model_type: 3 is not supported"),
        ('{"rope_theta": 1, "rope_theta": 2}', "rope_theta stands twice"),
        ("[" * 100_000, "nested too deep"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "not readable as JSON"),
    ],
    ids=["list", "object", "number", "twice", "deep", "digits"],
)
def test_a_file_that_is_no_config_is_one_line(text, told, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((ConfigError, CheckpointError), match=told) as caught:
        read_architecture(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: .*it is no file"):
        read_architecture(tmp_path)
