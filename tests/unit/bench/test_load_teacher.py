"""Folders of holes are sliced as planned, and reading them keeps little of the files in memory."""

from bench.cost import peak_bytes
from bench.load_teacher import RANKS, slice_all
from bench.shapes import LLADA2_MINI
from bench.sparse_model import write_sparse
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.params import param_mappings

SMALL = {"num_hidden_layers": 2, "vocab_size": 1001, "num_experts": 16, "num_attention_heads": 4}


def test_what_is_read_is_what_was_planned(tmp_path):
    architecture = write_sparse(tmp_path, {**LLADA2_MINI, **SMALL}, shard_bytes=20_000_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = slice_all(tmp_path)
    assert found["as_planned"]
    assert found["on_disk"] < 10_000_000
    experts = sum(piece.elements for piece in param_mappings(architecture) if piece.expert is not None)
    head = 1001 * 2048
    everywhere = found["parameters"] - experts - head
    assert sum(rank["read"] for rank in found["ranks"]) == 2 * (experts + head + RANKS * everywhere)


def test_pages_that_were_read_are_let_go(tmp_path):
    write_sparse(tmp_path, {**LLADA2_MINI, **SMALL, "num_hidden_layers": 5, "num_experts": 64})
    with HfFolder(tmp_path) as source:
        names = [name for name in source.shapes if ".experts." in name]
        peak, _ = peak_bytes(lambda: [source.read(name).sum() for name in names])
        assert source.bytes_read > 1.6e9
    assert peak < 0.5e9
