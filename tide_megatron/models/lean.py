"""A decoder's pass straight over the weights of megatron-core's layers, for models on one rank.

A pass of decoding feeds a block of 32 tokens, and megatron-core's modules spend more time around their
products than in them (autograd functions, copies between layouts, dropout of nothing): half a pass on a CPU,
most of one on a GPU. Here each layer is its products and norms, batch first. What a mixture does with its
tokens stays megatron-core's. A test holds both ways equal.

Left out: layers of Transformer Engine and quantised ones, which know how to compute themselves, and models
cut over ranks; `is_lean` says which are meant, and others go through their own `forward`.
"""

from __future__ import annotations

import tide_megatron.platform

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import linear

from tide_megatron.diffusion.views import View
from tide_megatron.models.attention import AttentionPlan, PassAttention
from tide_megatron.models.build import TideModel
from tide_megatron.models.params import LOCAL


def is_lean(model: TideModel) -> bool:
    """Say whether a model's passes can be computed here."""
    config = model.config
    is_whole = config.tensor_model_parallel_size == config.pipeline_model_parallel_size == 1
    return is_whole and model.spelling is LOCAL and all(map(_is_plain, model.decoder.layers))


def _is_plain(layer: TransformerLayer) -> bool:
    """Say whether a layer's matrices are what they seem: of floating point, not FP8 with scales."""
    attention = [layer.self_attention.linear_qkv, layer.self_attention.linear_proj]
    products = attention + ([layer.mlp.linear_fc1, layer.mlp.linear_fc2] if type(layer.mlp) is MLP else [])
    return all(
        isinstance(getattr(product, "weight", None), torch.nn.Parameter) and product.weight.itemsize > 1
        for product in products
    )


def lean_rows(model: TideModel, view: View, reading: PassAttention) -> Tensor:
    """Return what `TideModel.rows` returns for a decoder's view, without gradients.

    Args:
        model: one that `is_lean`.
        view: what is fed, and the rows that are wanted.
        reading: how it attends.
    """
    plan = model.plan(view, reading)
    hidden = model.embed(view).transpose(0, 1)  # [samples, tokens, hidden]
    *layers, last = model.decoder.layers
    for layer in layers:
        hidden = _fed_forward(layer, _attended(layer, hidden, plan))
    rows = _attended(last, hidden, plan).flatten(0, 1)
    # The stand-in for no row: megatron-core's router cannot reshape nothing.
    picked = rows.index_select(0, view.rows) if len(view.rows) else rows[:1]
    answer: Tensor = model.decoder.final_layernorm(_fed_forward(last, picked[:, None]))
    return answer[: len(view.rows), 0]


def _attended(layer: TransformerLayer, hidden: Tensor, plan: AttentionPlan) -> Tensor:
    """Return hidden states [samples, tokens, hidden] after a layer's attention."""
    attention, config = layer.self_attention, layer.config
    samples, tokens = hidden.shape[:2]
    groups, width = config.num_query_groups, config.kv_channels
    heads = config.num_attention_heads // groups
    product = attention.linear_qkv
    mixed = linear(layer.input_layernorm(hidden), product.weight, product.bias)
    # Of each group its queries, its key, its value.
    mixed = mixed.view(samples, tokens, groups, heads + 2, width)
    query, key, value = torch.split(mixed, [heads, 1, 1], dim=3)
    query = query.reshape(samples, tokens, groups * heads, width)
    key, value = key[:, :, :, 0], value[:, :, :, 0]
    if config.qk_layernorm:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    answer = attention.core_attention(
        *(part.transpose(0, 1) for part in (query, key, value)), None, attention_bias=plan
    )  # [tokens, samples, heads * head_dim]
    product = attention.linear_proj
    return hidden + linear(answer.transpose(0, 1), product.weight, product.bias)


def _fed_forward(layer: TransformerLayer, hidden: Tensor) -> Tensor:
    """Return hidden states, of any first two dimensions, after a layer's feed-forward part."""
    normed = layer.pre_mlp_layernorm(hidden)
    if type(layer.mlp) is not MLP:
        mixture: Tensor = layer.mlp(normed)[0]
        return hidden + mixture
    up = layer.mlp.linear_fc1
    gate, straight = linear(normed, up.weight, up.bias).chunk(2, dim=-1)
    opened: Tensor = layer.config.activation_func(gate) * straight
    down = layer.mlp.linear_fc2
    return hidden + linear(opened, down.weight, down.bias)
