"""An architecture of no model, in one class and one line of the table: Gemma's norms, gate, embedding.

Everything else follows: it is read from a folder, built, computes what plain torch computes, and is written.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from tests.tiny_run import write_folder
from tests.unit.models.shapes import CPU, DENSE, architecture, view
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.mask import dense_mask
from tide_megatron.models.arch import ARCHITECTURES
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.build import build_model
from tide_megatron.models.params import hf_shapes
from tide_megatron.models.spec import ModelOptions, transformer_config
from tide_megatron.models.weights import draw_weights, load_model, read_architecture, save_model

CONFIG = {
    **DENSE,
    "model_type": "made-up",
    "rms_norm_eps": 1e-4,
    "hidden_activation": "gelu_pytorch_tanh",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeUp(Architecture):
    model_types = ("made-up",)
    keys = {"hidden_act": "hidden_activation"}  # noqa: RUF012 - declared by the class above

    @classmethod
    def read(cls, read):
        common = read.common(activation="gelu_pytorch_tanh")
        return cls(**common, zero_centered_norms=True, embedding_scale=common["hidden"] ** 0.5)

    def to_hf(self):
        return {**self.source, **self.common_hf()}


@pytest.fixture(autouse=True)
def _listed(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "made-up", MadeUp)


def by_plain_torch(weights, ids, positions, mask):
    """Return the logits [samples, tokens, vocabulary] of CONFIG, layer by layer."""
    heads, groups, width = (CONFIG[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def norm(states, name):
        scale = torch.rsqrt(states.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])
        return states * scale * (1 + weights[f"{name}.weight"])

    def rotated(states):
        angles = positions[..., None] * CONFIG["rope_theta"] ** (-torch.arange(0, width, 2) / width)
        turn = torch.polar(torch.ones_like(angles), angles)[:, :, None]  # [samples, tokens, 1, width / 2]
        first, second = states.chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    table = weights["model.embed_tokens.weight"]
    states = functional.embedding(ids, table) * CONFIG["hidden_size"] ** 0.5
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        inner = norm(states, f"{at}input_layernorm")
        query, key, value = (
            (inner @ weights[f"{at}self_attn.{part}_proj.weight"].T).unflatten(-1, (-1, width))
            for part in "qkv"
        )
        query, key = (
            rotated(norm(query, f"{at}self_attn.q_norm")),
            rotated(norm(key, f"{at}self_attn.k_norm")),
        )
        key, value = (part.repeat_interleave(heads // groups, dim=2) for part in (key, value))
        scores = torch.einsum("sqhd,skhd->shqk", query, key) / width**0.5
        seen = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        attended = torch.einsum("shqk,skhd->sqhd", seen, value).flatten(2)
        states = states + attended @ weights[f"{at}self_attn.o_proj.weight"].T
        inner = norm(states, f"{at}post_attention_layernorm")
        gate, up, down = (weights[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        gated = functional.gelu(inner @ gate.T, approximate="tanh") * (inner @ up.T)
        states = states + gated @ down.T
    return norm(states, "model.norm") @ table.T


def test_a_made_up_architecture_is_read_computes_and_is_written(groups, tmp_path):
    draw = torch.Generator().manual_seed(3)
    shapes = hf_shapes(MadeUp.from_hf(CONFIG))
    weights = {name: torch.randn(shape, generator=draw) * 0.2 for name, shape in shapes.items()}
    write_folder(tmp_path / "m", CONFIG, weights)
    model = build_model(read_architecture(tmp_path / "m"), groups, ModelOptions(device=CPU))
    load_model(model, tmp_path / "m")
    seen = view(CONFIG["vocab_size"], length=12, block_size=4)
    mask = dense_mask(seen.context, seen.length)
    expected = by_plain_torch(weights, seen.ids, seen.positions, mask).flatten(0, 1)
    found = model.rows(seen) @ model.head_weight.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    save_model(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert read_architecture(tmp_path / "again") == model.architecture


def test_its_gradient_reaches_the_table_through_the_scale_in_both_ways(groups):
    model = build_model(MadeUp.from_hf(CONFIG), groups, ModelOptions(device=CPU, trainable=True))
    draw_weights(model, 1)
    assert model.decoder.layers[0].input_layernorm.weight.eq(0).all()
    seen, table = view(CONFIG["vocab_size"]), model.embedding.word_embeddings.weight
    model.rows(seen).pow(3).sum().backward()
    expected = table.grad.clone()
    table.main_grad = torch.zeros_like(table)  # as inside megatron-core's DDP
    model.rows(seen).pow(3).sum().backward()
    torch.testing.assert_close(table.main_grad, expected, rtol=1e-4, atol=1e-4)


def test_another_activation_is_refused_by_the_familys_own_key():
    with pytest.raises(ConfigError, match="hidden_activation: 'silu' is not supported"):
        MadeUp.from_hf({**CONFIG, "hidden_activation": "silu"})


@pytest.mark.parametrize(("config", "is_fused"), [(CONFIG, False), (DENSE, True)])
def test_only_a_gate_that_megatron_core_fuses_as_it_is_meant_is_fused_on_cuda(config, is_fused):
    """Its fused GELU is the tanh form, under the name of the other."""
    options = ModelOptions(device=Device(type="cuda", index=0, backend="gloo", threads=1))
    assert transformer_config(architecture(config), options).bias_activation_fusion is is_fused
