"""Hugging Face -> every rank's share -> Hugging Face, bit for bit: each architecture in each legal layout.

The tensors are random bits, so NaNs and signed zeros are among them. A cell of the matrix is an architecture
in a layout; the last test prints it (`-s`) and fails when one did not run.
"""

import dataclasses
import itertools
import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.models.shapes import DENSE, DREAM, LLADA, LLADA_MOE, MIXTURE, WEDLM, architecture
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import check_widths
from tide_megatron.models.gather import whole
from tide_megatron.models.holding import held
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
    shapes = {name: shape for piece in read.pieces() for name, shape in piece.sources.items()}
    return {name: random_bits(name, shape, dtype) for name, shape in shapes.items()}


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


def shared_out(read, shards, tensors, *, merged=False):
    """Return what every rank holds of the stored tensors."""
    return [
        {
            name: piece.join([take(piece, source, tensors) for source in piece.sources]).clone()
            for name, piece in held(read, shard, merged=merged)
        }
        for shard in shards
    ]


def take(piece, source, tensors):
    part = piece.part(source)
    return tensors[source] if part is None else part.take(tensors[source])


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same(found, wanted):
    found = dict(found)
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
        assert same(whole(read, shards, shared_out(read, shards, tensors)), tensors), f"{name} {layout}"
        MATRIX[name, layout] = "="


def test_replicas_and_router_biases_of_another_dtype():
    read, layout = architecture(CONFIGS["llada2_moe"]), Layout(tensor=2, pipeline=2, expert=2)
    tensors = stored(read, torch.bfloat16)
    tensors |= {
        name: random_bits(name, value.shape) for name, value in tensors.items() if "expert_bias" in name
    }
    shards = places(read, layout, world=16)
    assert same(whole(read, shards, shared_out(read, shards, tensors)), tensors)


@pytest.mark.parametrize("layout", LAYOUTS, ids=short)
def test_merged_experts_are_the_same_experts(layout):
    read = architecture(CONFIGS["llada2_moe"])
    tensors = stored(read)
    merged = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer, part in itertools.product((1, 2), ("gate", "up", "down")):
        split = [f"model.layers.{layer}.mlp.experts.{number}.{part}_proj.weight" for number in range(8)]
        stacked = torch.stack([tensors[name].view(torch.int32) for name in split])
        merged[f"model.layers.{layer}.mlp.experts.{part}_proj"] = stacked.view(torch.float32)
    shapes = {name: shape for piece in read.pieces(merged=True) for name, shape in piece.stored.items()}
    assert {name: tuple(value.shape) for name, value in merged.items()} == shapes
    assert read.has_merged(merged)
    assert not read.has_merged(tensors)
    shards = places(read, layout)
    assert same(whole(read, shards, shared_out(read, shards, merged, merged=True)), tensors)


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
    if name.startswith("llada_moe") or name == "llada2_moe":
        config |= {"num_experts": experts, "num_experts_per_tok": 1, "moe_layer_freq": [1] * layers}
        config |= {
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": per_expert,
            "first_k_dense_replace": 0,
        }
        config |= {"expert_intermediate_size": per_expert, "partial_rotary_factor": 1}
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
        config |= {"intermediate_size": width, "dense_intermediate_size": width}
    layout = Layout(tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=slices)
    return architecture(config), layout


@settings(max_examples=60)
@given(drawn=models())
def test_any_legal_shape_goes_there_and_back(drawn):
    read, layout = drawn
    legal(read, layout)
    tensors = stored(read)
    shards = places(read, layout)
    assert same(whole(read, shards, shared_out(read, shards, tensors)), tensors)


def spoilt(layout, change, name="llada2_moe"):
    read = architecture(CONFIGS[name])
    shards = places(read, layout)
    ranks = shared_out(read, shards, stored(read))
    change(ranks)
    with pytest.raises(CheckpointError) as caught:
        for _ in whole(read, shards, ranks):
            pass
    return str(caught.value)


NORM = "decoder.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(("here", "there"), [(0.0, -0.0), (1.0, 1.0000001), (float("nan"), 1.0)])
def test_copies_must_agree_bit_for_bit(here, there):
    def change(ranks):
        for rank, values in enumerate(ranks):
            values[NORM].fill_(there if rank == 2 else here)

    told = spoilt(Layout(tensor=4), change)
    assert "model.layers.0.input_layernorm.weight: rank 2 holds other values than rank 0" in told


def test_a_tied_heads_slice_must_be_the_embeddings():
    def change(ranks):
        ranks[1]["output_layer.weight"][5, 3] = 7.0  # the second stage's slice: ids 31 to 60

    told = spoilt(Layout(pipeline=2), change, "a2d-qwen3")
    assert "model.embed_tokens.weight: rank 1 holds other values than rank 0" in told


def test_experts_of_data_parallel_ranks_must_agree():
    def change(ranks):
        ranks[2]["decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"][0, 0] = 7.0

    told = spoilt(Layout(tensor=4, expert=2), change)  # ranks 0 and 2 hold experts 0 to 3
    assert "model.layers.1.mlp.experts.3.down_proj.weight: rank 2 holds other values than rank 0" in told


def test_what_is_lacking_is_named():
    read, layout = architecture(CONFIGS["llada2_moe"]), Layout(tensor=2, pipeline=2)
    shards = places(read, layout)
    ranks = shared_out(read, shards, stored(read))
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: no rank holds it"):
        dict(whole(read, shards[2:], ranks[2:]))
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: 33 of 67 rows are on no rank"):
        dict(whole(read, shards[::2], ranks[::2]))
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: rank 0 has \[34, 32\], its layout"):
        dict(whole(read, places(read, Layout(pipeline=2)), ranks[:2]))
    del ranks[1][NORM]
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight: rank 1 lacks it"):
        dict(whole(read, shards, ranks))
    half = [
        {name: value.bfloat16() if rank else value for name, value in own.items()}
        for rank, own in enumerate(ranks)
    ]
    with pytest.raises(CheckpointError, match=r"rank 1 holds torch\.bfloat16, another rank torch\.float32"):
        dict(whole(read, shards, half))


def test_pads_of_the_vocabulary_are_dropped():
    read = architecture(CONFIGS["a2d-qwen3"])
    tensors, shards = stored(read), places(read, Layout(tensor=4))  # 61 ids in 64 rows
    ranks = shared_out(read, shards, tensors)
    ranks[3]["embedding.word_embeddings.weight"][-3:] = 7.0
    assert same(whole(read, shards, ranks), tensors)


def test_tensors_are_asked_for_one_by_one():
    read = architecture(CONFIGS["llada"])
    shards = places(read, Layout(tensor=2))
    asked = []

    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    found = whole(read, shards, [Lazy(own) for own in shared_out(read, shards, stored(read))])
    assert next(found)[0] == "model.transformer.wte.weight"
    assert set(asked) == {"embedding.word_embeddings.weight"}


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
