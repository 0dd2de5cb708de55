"""Hugging Face -> every rank's share -> Hugging Face, bit for bit: each architecture in each legal layout.

The tensors are random bits, so NaNs and signed zeros are among them. A cell of the matrix is an architecture
in a layout; the last test prints it (`-s`) and fails when one did not run.
"""

import dataclasses
import itertools
import math
import re
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.models.shapes import DENSE, DREAM, LLADA, LLADA_MOE, MIXTURE, WEDLM, architecture
from tests.whole_model import bits, whole_tensors
from tide_megatron.base.errors import ConfigError
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import check_widths
from tide_megatron.models.params import FUSED, LOCAL, hf_shapes, local_params
from tide_megatron.models.shard import Shard
from tide_megatron.parallel.layout import Layout

FOUR_GROUPS = {"num_key_value_heads": 4}  # so that four tensor ranks can share them
CONFIGS = {
    "a2d-qwen3": {**DENSE, **FOUR_GROUPS},
    "qwen3": {**DENSE, **FOUR_GROUPS, "model_type": "qwen3", "tie_word_embeddings": False},
    "wedlm": {**WEDLM, **FOUR_GROUPS},
    "wedlm, norms": {**WEDLM, **FOUR_GROUPS, "attention_bias": False, "qk_norm": True},
    "dream": {**DREAM, **FOUR_GROUPS},
    "llada": LLADA,
    "llada, tied": {**LLADA, "weight_tying": True},
    "llada2_moe": {**MIXTURE, **FOUR_GROUPS},
    "llada_moe": LLADA_MOE,
    "llada_moe, plain": {**LLADA_MOE, "moe_layer_freq": [1] * 3, "shared_expert_intermediate_size": None},
}
LAYOUTS = [
    Layout(tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=slices)
    for tensor, pipeline, expert, slices in itertools.product((1, 2, 4), (1, 2), (1, 2, 4), (1, 2))
]
MATRIX: dict[tuple[str, Layout], str] = {}
"""What became of each cell of this run."""


def short(layout):
    return " ".join(f"{word}{size}" for word, size in zip("TPES", dataclasses.astuple(layout), strict=True))


def random_bits(name, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    width = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    info = torch.iinfo(width)
    return torch.randint(info.min, info.max, shape, generator=generator, dtype=width).view(dtype)


def stored(read, dtype=torch.float32):
    return {name: random_bits(name, shape, dtype) for name, shape in hf_shapes(read).items()}


def world_of(layout):
    return layout.pipeline * math.lcm(layout.tensor, layout.expert * layout.expert_tensor)


def places(read, layout, world=None):
    """Return the shard of every rank; a replica shares the head by equal runs of ids, as in a run."""
    world, size = world or world_of(layout), layout.replica_size
    width = -(-read.vocabulary // size)
    heads = [
        (min(place * width, read.vocabulary), min((place + 1) * width, read.vocabulary))
        for place in range(size)
    ]
    return [
        Shard.of(layout, rank, world, read.layers, heads[rank % size] if size > 1 else None)
        for rank in range(world)
    ]


def shared_out(read, shards, tensors, *, merged=False, spelling=LOCAL):
    """Return what every rank holds of the stored tensors."""
    return [
        {
            name: piece.join([take(piece, source, tensors) for source in piece.sources]).clone()
            for name, piece in local_params(read, shard, merged=merged, spelling=spelling)
        }
        for shard in shards
    ]


def take(piece, source, tensors):
    part = piece.part(source)
    return tensors[source] if part is None else part.take(tensors[source])


def same(found, wanted):
    assert list(found) == list(wanted)
    return all(
        found[name].dtype is wanted[name].dtype and torch.equal(bits(found[name]), bits(wanted[name]))
        for name in wanted
    )


def legal(read, layout):
    layout.check(
        world_of(layout),
        heads=read.heads,
        groups=read.query_groups,
        experts=read.num_experts,
        layers=read.layers,
    )
    check_widths(read, layout)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_in_every_layout(name):
    read = architecture(CONFIGS[name])
    tensors = stored(read)
    for layout in LAYOUTS:
        if not read.num_experts and layout.expert * layout.expert_tensor > 1:
            with pytest.raises(ConfigError, match="the model has no experts"):
                legal(read, layout)
            MATRIX[name, layout] = "-"
            continue
        legal(read, layout)
        shards = places(read, layout)
        for spelling in (LOCAL, FUSED):
            ranks = shared_out(read, shards, tensors, spelling=spelling)
            assert same(whole_tensors(read, shards, ranks, spelling), tensors), f"{name} {layout} {spelling}"
        MATRIX[name, layout] = "="


@pytest.mark.parametrize("layout", [Layout(), Layout(expert=2), Layout(tensor=2, expert=2)], ids=short)
def test_both_spellings_name_the_same_tensors(layout):
    """Only the norms before dense products and the experts have other names; nothing else moves."""
    read = architecture(CONFIGS["llada2_moe"])
    for shard in places(read, layout):
        local = dict(local_params(read, shard))
        fused = dict(local_params(read, shard, spelling=FUSED))
        renamed = {
            re.sub(
                r"\.local_experts\.(\d+)\.(linear_fc[12])\.weight$",
                r".\2.weight\1",
                name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
            ).replace(".0.pre_mlp_layernorm.weight", ".0.mlp.linear_fc1.layer_norm_weight"): mapping
            for name, mapping in local.items()
        }
        assert list(fused) == list(renamed)
        assert [dict(one.sources) for one in fused.values()] == [dict(one.sources) for one in local.values()]
        assert len(fused) == len(set(fused)) > 60 // layout.expert


def test_replicas_and_router_biases_of_another_dtype():
    read, layout = architecture(CONFIGS["llada2_moe"]), Layout(tensor=2, pipeline=2, expert=2)
    tensors = stored(read, torch.bfloat16)
    tensors |= {
        name: random_bits(name, value.shape) for name, value in tensors.items() if "expert_bias" in name
    }
    shards = places(read, layout, world=16)
    assert same(whole_tensors(read, shards, shared_out(read, shards, tensors)), tensors)


@pytest.mark.parametrize("layout", LAYOUTS, ids=short)
def test_merged_experts_are_the_same_experts(layout):
    read = architecture(CONFIGS["llada2_moe"])
    tensors = stored(read)
    merged = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer, part in itertools.product((1, 2), ("gate", "up", "down")):
        split = [f"model.layers.{layer}.mlp.experts.{number}.{part}_proj.weight" for number in range(8)]
        stacked = torch.stack([tensors[name].view(torch.int32) for name in split])
        merged[f"model.layers.{layer}.mlp.experts.{part}_proj"] = stacked.view(torch.float32)
    assert {name: tuple(value.shape) for name, value in merged.items()} == hf_shapes(read, merged=True)
    assert read.has_merged(merged)
    assert not read.has_merged(tensors)
    shards = places(read, layout)
    assert same(whole_tensors(read, shards, shared_out(read, shards, merged, merged=True)), tensors)


@st.composite
def models(draw):
    """Draw a model and a layout that is legal for it."""
    tensor, pipeline = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3]))
    expert, slices = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3]))
    name = draw(st.sampled_from(sorted(CONFIGS)))
    config = dict(CONFIGS[name])
    groups = tensor * draw(st.integers(1, 2))
    heads = groups if "llada" in name and "2" not in name else groups * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 3))
    layers = pipeline + draw(st.integers(0, 2))
    vocabulary = draw(st.integers(1, 40))
    width = tensor * draw(st.integers(1, 3))
    experts = expert * draw(st.integers(1, 2))
    per_expert = slices * tensor * draw(st.integers(1, 2))
    if name == "llada2_moe":
        config |= {"num_experts": experts, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
        config |= {"moe_intermediate_size": per_expert, "first_k_dense_replace": 0}
        config |= {"partial_rotary_factor": 1}
    elif name.startswith("llada_moe"):
        config |= {"num_experts": experts, "num_experts_per_tok": 1, "moe_layer_freq": [1] * layers}
        config |= {"expert_intermediate_size": per_expert}
        if config.get("shared_expert_intermediate_size"):
            config["shared_expert_intermediate_size"] = width
    else:
        expert = slices = 1
    if name.startswith("llada") and "moe" not in name:
        config |= {"n_layers": layers, "d_model": heads * head_dim, "n_heads": heads, "n_kv_heads": heads}
        config |= {"mlp_hidden_size": width, "vocab_size": vocabulary, "embedding_size": vocabulary}
    else:
        config |= {"num_hidden_layers": layers, "hidden_size": draw(st.integers(1, 9)), "head_dim": head_dim}
        config |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary}
        config["dense_intermediate_size" if name.startswith("llada_moe") else "intermediate_size"] = width
    layout = Layout(tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=slices)
    return architecture(config), layout


@settings(max_examples=60)
@given(drawn=models())
def test_any_legal_shape_goes_there_and_back(drawn):
    read, layout = drawn
    legal(read, layout)
    tensors = stored(read)
    shards = places(read, layout)
    assert same(whole_tensors(read, shards, shared_out(read, shards, tensors)), tensors)


def test_copies_that_differ_are_seen():
    read, layout = architecture(CONFIGS["llada2_moe"]), Layout(tensor=4, expert=2)
    shards = places(read, layout)
    for name in (
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight",  # ranks 0 and 2 hold experts 0 to 3
    ):
        ranks = shared_out(read, shards, stored(read))
        ranks[2][name].flatten()[0] = 7.0
        with pytest.raises(AssertionError, match="rank 2 holds other values"):
            whole_tensors(read, shards, ranks)


def test_pads_of_the_vocabulary_are_dropped():
    read = architecture(CONFIGS["a2d-qwen3"])
    tensors, shards = stored(read), places(read, Layout(tensor=4))  # 61 ids in 64 rows
    ranks = shared_out(read, shards, tensors)
    ranks[3]["embedding.word_embeddings.weight"][-3:] = 7.0
    assert same(whole_tensors(read, shards, ranks), tensors)


def test_the_whole_matrix_ran():
    width = max(map(len, CONFIGS))
    print("\n\nround trip bit for bit (=), refused because there are no experts (-)")
    print("T tensor, P pipeline, E expert, S expert_tensor")
    print(" " * 11, *(name.rjust(width) for name in CONFIGS))
    for layout in LAYOUTS:
        cells = (MATRIX.get((name, layout), "NOT RUN").rjust(width) for name in CONFIGS)
        print(short(layout), *cells)
    assert {type(architecture(config)) for config in CONFIGS.values()} == set(ARCHITECTURES.values())
    assert MATRIX.keys() == set(itertools.product(CONFIGS, LAYOUTS))
