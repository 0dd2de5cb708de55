"""Weight mappings: values placed by hand, both directions inverse, experts numbered per rank."""

import pytest
import torch

from tests.unit.models.shapes import DENSE, MIXTURE, architecture
from tide_megatron.models.mapping import FusedQkv, GatedPair, Heads, Qkv
from tide_megatron.models.params import hf_shapes, local_params, param_mappings
from tide_megatron.models.shard import Shard

HEADS = Heads(heads=4, groups=2, head_dim=2)  # query rows 0-7, key rows 10-13, value rows 20-23
QUERY, KEY, VALUE = torch.arange(8), torch.arange(10, 14), torch.arange(20, 24)
BY_GROUP = [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]


def table(rows):
    return rows[:, None].expand(-1, 3).contiguous().float()


@pytest.mark.parametrize("shape", [lambda rows: rows, table])
def test_qkv_rows_are_interleaved_by_group(shape):
    parts = [shape(QUERY), shape(KEY), shape(VALUE)]
    qkv = Qkv(target="x", sources={"q": (8, 3), "k": (4, 3), "v": (4, 3)}, shape=HEADS)
    joined = qkv.join(parts)
    assert joined.reshape(16, -1)[:, 0].tolist() == BY_GROUP
    assert all(torch.equal(back, part) for back, part in zip(qkv.split(joined), parts, strict=True))
    fused = FusedQkv(target="x", sources={"qkv": (16, 3)}, shape=HEADS)
    assert torch.equal(fused.join([torch.cat(parts)]), joined)
    assert torch.equal(fused.split(joined)[0], torch.cat(parts))


def test_gate_comes_before_up():
    pair = GatedPair(target="x", sources={"gate": (2, 1), "up": (2, 1)})
    gate, up = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    joined = pair.join([gate, up])
    assert joined.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]
    assert [part.tolist() for part in pair.split(joined)] == [gate.tolist(), up.tolist()]
    assert pair.joined_shape == (4, 1)


@pytest.mark.parametrize(
    ("config", "num_sources"), [(DENSE, 2 + 2 * 11), (MIXTURE, 3 + 3 * 6 + 3 + 2 * (2 + 3 * 9))]
)
def test_table_names_every_tensor_once(config, num_sources):
    pieces = param_mappings(architecture(config))
    sources = [name for piece in pieces for name in piece.sources]
    targets = [(piece.target, piece.layer, piece.expert) for piece in pieces]
    assert len(sources) == len(set(sources)) == num_sources
    assert len(targets) == len(set(targets))


def test_switches_add_and_remove_weights():
    names = hf_shapes(architecture(DENSE, model_type="wedlm", tie_word_embeddings=False))
    assert "model.layers.0.self_attn.q_proj.bias" in names, "WeDLM's default has biases"
    assert not any("norm.weight" in name and "self_attn" in name for name in names), "and no head norms"
    assert "lm_head.weight" in names


@pytest.mark.parametrize("size", [1, 2, 4])
def test_experts_lie_in_equal_runs(size):
    seen = []
    for rank in range(size):
        own = {
            (piece.expert, name)
            for name, piece in local_params(
                architecture(MIXTURE), Shard(expert_rank=rank, expert_size=size, num_layers=3)
            )
            if piece.expert is not None and "layers.1" in name and "linear_fc1" in name
        }
        per_rank = 8 // size
        first = rank * per_rank
        assert own == {
            (first + local, f"decoder.layers.1.mlp.experts.local_experts.{local}.linear_fc1.weight")
            for local in range(per_rank)
        }
        seen += [expert for expert, _ in own]
    assert sorted(seen) == list(range(8))
