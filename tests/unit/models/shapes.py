"""Small configs and models that the tests of this folder build."""

from __future__ import annotations

import torch

from tide_megatron.base.device import Device
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.segments import Segments
from tide_megatron.diffusion.views import View
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import build_model
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights

CPU = Device(type="cpu", index=0, backend="gloo", threads=1)

DENSE = {
    "model_type": "a2d-qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 61,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}

MIXTURE = {
    "model_type": "llada2_moe",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "intermediate_size": 80,
    "vocab_size": 67,
    "rope_theta": 600000.0,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}


WEDLM = {**DENSE, "model_type": "wedlm", "tie_word_embeddings": False}
"""With WeDLM's defaults: biased queries, keys and values, no head norms."""

DREAM = {
    "model_type": "Dream",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "mask_token_id": 60,
}

LLADA = {
    "model_type": "llada",
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "mlp_hidden_size": 48,
    "vocab_size": 59,
    "embedding_size": 61,
    "max_sequence_length": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "init_std": 0.02,
    "weight_tying": False,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "include_bias": False,
}

LLADA_MOE = {
    "model_type": "lladamoe",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "dense_intermediate_size": 80,
    "expert_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "vocab_size": 67,
    "rope_theta": 50000,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_layer_freq": [0, 1, 1],
    "qk_layernorm": True,
}


def architecture(config, **changes):
    config = {**config, **changes}
    return ARCHITECTURES[config["model_type"]].from_hf(config)


def build(config, groups, *, seed=1, **changes):
    options = {
        key: changes.pop(key) for key in ("trainable", "attention", "precision", "layout") if key in changes
    }
    model = build_model(architecture(config, **changes), groups, ModelOptions(device=CPU, **options))
    draw_weights(model, seed)
    return model


def view(vocabulary, *, samples=2, length=24, kind="block_diffusion", block_size=8, lengths=None, seed=0):
    context = Context(kind=kind, block_size=block_size)
    tokens = length * context.parts
    ids = torch.randint(0, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    return View(
        ids=ids,
        positions=torch.arange(length).repeat(context.parts).expand(samples, -1),
        context=context,
        length=length,
        segments=None if lengths is None else Segments.of_rows(lengths),
        rows=torch.arange(ids.numel()),
    )
