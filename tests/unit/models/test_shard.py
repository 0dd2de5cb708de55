"""What a rank holds, by hand: places, ranges of stored tensors, padded vocabularies, head slices, sizes."""

import pytest
import torch

from tests.unit.models.shapes import DENSE, MIXTURE, architecture
from tide_megatron.base.errors import ConfigError
from tide_megatron.models.build import check_widths
from tide_megatron.models.mapping import Copy, FusedQkv, GatedPair, Heads, Qkv
from tide_megatron.models.params import local_params, num_local_bytes
from tide_megatron.models.shard import Part, Shard
from tide_megatron.parallel.layout import Layout

BYTE = torch.uint8
"""So that bytes are elements."""
LOWER = Shard(tensor_rank=1, tensor_size=2, num_layers=3)


def numbered(rows, columns):
    """Number the elements: row r, column c is 100 r + c."""
    return 100.0 * torch.arange(rows)[:, None] + torch.arange(columns)


def joined(piece, *sources):
    parts = [
        piece.parts[name].take(source) if name in piece.parts else source
        for name, source in zip(piece.sources, sources, strict=True)
    ]
    assert [tuple(part.shape) for part in parts] == list(piece.shapes.values())
    ours = piece.join(parts)
    assert ours.shape == piece.joined_shape
    assert all(torch.equal(back, part) for back, part in zip(piece.split(ours), parts, strict=True))
    return ours


def test_column_parallel_pieces_are_runs_of_whole_groups():
    heads = Heads(heads=4, groups=2, head_dim=2)
    query, key, value = numbered(8, 3), numbered(4, 3) + 1000, numbered(4, 3) + 2000
    qkv = Qkv(target="x", sources={"q": (8, 3), "k": (4, 3), "v": (4, 3)}, shape=heads).share(LOWER)
    rows = [400, 500, 600, 700, 1200, 1300, 2200, 2300]
    assert joined(qkv, query, key, value)[:, 0].tolist() == rows
    fused = FusedQkv(target="x", sources={"qkv": (16, 3)}, shape=heads).share(LOWER)
    assert joined(fused, torch.cat([query, key, value]))[:, 0].tolist() == rows
    bias = Qkv(target="x", sources={"q": (8,), "k": (4,), "v": (4,)}, shape=heads).share(LOWER)
    assert joined(bias, query[:, 0], key[:, 0], value[:, 0]).tolist() == rows


def test_gate_and_up_are_each_cut():
    pair = GatedPair(target="x", sources={"gate": (4, 2), "up": (4, 2)}).share(LOWER)
    ours = joined(pair, numbered(4, 2), numbered(4, 2) + 1000)
    assert ours[:, 0].tolist() == [200, 300, 1200, 1300]


def test_row_parallel_pieces_are_columns():
    piece = Copy(target="x", sources={"o": (2, 4)}, axis=1).share(LOWER)
    assert joined(piece, numbered(2, 4)).tolist() == [[2, 3], [102, 103]]
    assert Copy.of("x", "norm", (4,)).share(LOWER).parts == {}


def test_experts_are_cut_by_expert_tensor_ranks():
    shard = Shard(tensor_size=2, expert_tensor_rank=1, expert_tensor_size=4, num_layers=1)
    sources = {"gate": (4, 2), "up": (4, 2)}
    assert GatedPair(target="x", sources=sources, expert=3).share(shard).parts["up"].ranges == ((1, 2),)
    assert GatedPair(target="x", sources=sources).share(shard).parts["up"].ranges == ((0, 2),)


def test_parts_of_nothing_and_of_zeros():
    whole = numbered(5, 2)
    assert Part(ranges=((3, 3),)).take(whole).shape == (0, 2)
    part = Part(ranges=((4, 5),), zero_rows=2)
    assert part.take(whole)[:, 1].tolist() == [401, 0, 0]
    assert part.shape((5, 2)) == (3, 2)


@pytest.mark.parametrize(
    ("layout", "world", "rank", "expected"),
    [
        # rank = tensor + 2 * (stage + 2 * replica); the second replica continues the stage's list of ranks
        (Layout(tensor=2, pipeline=2), 8, 3, {"tensor_rank": 1, "first_layer": 2, "num_layers": 1}),
        (Layout(tensor=2, pipeline=2), 8, 4, {"tensor_rank": 0, "first_layer": 0, "num_layers": 2}),
        (Layout(pipeline=2, expert=2), 8, 6, {"expert_rank": 1, "is_first": True, "is_last": False}),
        (Layout(pipeline=2, expert=2), 8, 5, {"expert_rank": 0, "is_first": False, "is_last": True}),
        (Layout(expert=2, expert_tensor=2), 8, 6, {"expert_rank": 1, "expert_tensor_rank": 0}),
        (Layout(expert=2, expert_tensor=2), 8, 5, {"expert_rank": 0, "expert_tensor_rank": 1}),
        # stage 1 is 2 3 6 7; its places 2 and 3 are the second expert rank's
        (
            Layout(tensor=2, pipeline=2, expert=2, expert_tensor=2),
            8,
            7,
            {"expert_rank": 1, "expert_tensor_rank": 1, "tensor_rank": 1, "first_layer": 2},
        ),
    ],
)
def test_places_by_hand(layout, world, rank, expected):
    shard = Shard.of(layout, rank, world, layers=3)
    assert {name: getattr(shard, name) for name in expected} == expected


def names(config, shard):
    return {name for name, _ in local_params(architecture(config), shard)}


def test_layers_are_renumbered_and_ends_stay_at_the_ends():
    first, last = (Shard.of(Layout(pipeline=2), rank, 2, 3, head=(0, 5)) for rank in range(2))
    ours = names(MIXTURE, first)
    assert "embedding.word_embeddings.weight" in ours
    assert "decoder.final_layernorm.weight" not in ours
    assert any("layers.1.mlp.router" in name for name in ours)
    assert not any("layers.2" in name for name in ours)
    ours = names(MIXTURE, last)
    assert "embedding.word_embeddings.weight" not in ours
    assert {"decoder.final_layernorm.weight", "output_layer.weight"} <= ours
    sources = {source for _, piece in local_params(architecture(MIXTURE), last) for source in piece.sources}
    assert {name.split(".")[2] for name in sources if ".layers." in name} == {"2"}
    assert {name.split(".")[2] for name in ours if ".layers." in name} == {"0"}


@pytest.mark.parametrize(
    ("rank", "head", "is_embedded"),
    [(0, (0, 31), True), (0, (0, 32), False), (0, (31, 61), False), (1, (31, 61), True), (1, (9, 9), True)],
)
def test_a_tied_slice_that_the_embedding_holds_is_not_held_twice(rank, head, is_embedded):
    shard = Shard.of(Layout(tensor=2), rank, 2, 2, head)  # 61 ids, padded to 62: 0-30 and 31-60
    assert ("output_layer.weight" not in names(DENSE, shard)) == is_embedded
    untied = {**DENSE, "tie_word_embeddings": False}
    assert "output_layer.weight" in names(untied, shard)


def test_the_last_tensor_rank_pads_the_vocabulary():
    pieces = dict(local_params(architecture(DENSE), Shard.of(Layout(tensor=2), 1, 2, 2)))
    embedding = pieces["embedding.word_embeddings.weight"]
    assert embedding.joined_shape == (31, 32)
    part = embedding.parts["model.embed_tokens.weight"]
    assert (part.ranges, part.zero_rows) == (((31, 61),), 1)


def test_what_a_rank_holds_by_hand():
    # One layer of DENSE: qkv (64 + 32 + 32) * 32, out 64 * 32, feed-forward 3 * 48 * 32; four norms.
    layer, norms = 128 * 32 + 64 * 32 + 3 * 48 * 32, 2 * 32 + 2 * 16
    sizes = [
        (Layout(), 0, None, 61 * 32 + 2 * (layer + norms) + 32),
        (Layout(tensor=2), 1, (31, 61), 31 * 32 + 2 * (layer // 2 + norms) + 32),
        (Layout(tensor=2), 1, None, 31 * 32 + 61 * 32 + 2 * (layer // 2 + norms) + 32),
        (Layout(pipeline=2), 0, (0, 31), 61 * 32 + layer + norms),
        (Layout(pipeline=2), 1, (31, 61), 30 * 32 + layer + norms + 32),
    ]
    for layout, rank, head, expected in sizes:
        shard = Shard.of(layout, rank, 2, 2, head)
        assert num_local_bytes(architecture(DENSE), shard, BYTE) == expected, f"{layout} {rank} {head}"


def test_shares_add_up_to_the_model():
    read = architecture(MIXTURE)
    whole = num_local_bytes(read, Shard(num_layers=3), BYTE)
    for layout in (Layout(pipeline=2), Layout(pipeline=3)):
        size = layout.pipeline
        heads = [(67 * rank // size, 67 * (rank + 1) // size) for rank in range(size)]
        shards = [Shard.of(layout, rank, size, 3, head) for rank, head in enumerate(heads)]
        assert sum(num_local_bytes(read, shard, BYTE) for shard in shards) == whole


@pytest.mark.parametrize("head", [(-1, 3), (3, 2), (0, 62)])
def test_head_slices_outside_the_vocabulary_are_refused(head):
    shard = Shard(num_layers=2, head=head)
    with pytest.raises(ConfigError, match="are not a range of the 61 ids"):
        num_local_bytes(architecture(DENSE), shard, BYTE)


@pytest.mark.parametrize(
    ("config", "changes", "layout", "told"),
    [
        (
            DENSE,
            {"intermediate_size": 50},
            Layout(tensor=4),
            "tensor: 4 .* feed-forward width 50 .* tensor=2",
        ),
        (MIXTURE, {}, Layout(tensor=16), "tensor: 16 .* shared expert width 24 .* tensor=8"),
        (MIXTURE, {}, Layout(expert_tensor=7), "expert_tensor: 7 .* expert width 24 .* expert_tensor=1"),
    ],
)
def test_widths_that_ranks_cannot_share_are_refused(config, changes, layout, told):
    with pytest.raises(ConfigError, match=f"layout.{told}"):
        check_widths(architecture(config, **changes), layout)


def test_widths_that_ranks_can_share_pass():
    check_widths(architecture(MIXTURE), Layout(tensor=2, expert_tensor=8))
    check_widths(architecture(DENSE), Layout(tensor=16))
