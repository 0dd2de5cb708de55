"""Hugging Face's own Qwen3 as an oracle: it writes what we read, agrees, and reads what we write."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.unit.models.shapes import CPU, view
from tide_megatron.diffusion.mask import dense_mask
from tide_megatron.models.build import build_model
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import load_model, read_architecture, save_model


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_and_we_agree_in_both_directions(groups, tmp_path, tied):
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=20,
        rms_norm_eps=1e-5,
        max_position_embeddings=300,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    torch.manual_seed(4)
    theirs = Qwen3ForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists(), "several shards are read"

    ours = build_model(read_architecture(tmp_path / "theirs"), groups, ModelOptions(device=CPU))
    load_model(ours, tmp_path / "theirs")
    seen = view(97, length=17, block_size=5)
    mask = torch.zeros(1, 1, 34, 34).masked_fill(
        ~dense_mask(seen.context, 17), torch.finfo(torch.float32).min
    )
    with torch.no_grad():
        expected = theirs(
            seen.ids, attention_mask=mask.expand(2, -1, -1, -1), position_ids=seen.positions
        ).logits
        logits = (ours.rows(seen) @ ours.head_weight.T).view_as(expected)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    save_model(ours, tmp_path / "ours")
    again = Qwen3ForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in theirs.state_dict().items())
