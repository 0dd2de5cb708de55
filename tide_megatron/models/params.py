"""The parameters of an architecture: every weight with its Hugging Face tensors, whole or of one rank.

The table is made of `Architecture.names` and shapes alone, so loading, fresh weights, saving, gradients under
Hugging Face names and the memory picture follow for a new architecture.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import torch

from tide_megatron.models.architecture import Architecture, Gated
from tide_megatron.models.fp8 import SCALINGS, scale_shape
from tide_megatron.models.mapping import (
    EXPERT,
    LAYER,
    Copy,
    EmbeddingRows,
    FusedQkv,
    GatedPair,
    HeadRows,
    Heads,
    ParamMapping,
    Qkv,
)
from tide_megatron.models.precision import Fp8Options
from tide_megatron.models.shard import Shape, Shard

_MATRIX = re.compile(r"\.linear_(qkv|proj|fc1|fc2)\.weight\d*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spelling:
    """What megatron-core calls the weights that its layers and Transformer Engine's name differently."""

    attention_norm: str
    """Of a layer, before attention."""
    dense_norm: str
    """Of a layer, before a dense feed-forward block; a mixture's has one name everywhere."""
    expert: str
    """Of a mixture's experts: a weight, with `{part}` for `linear_fc1` or `linear_fc2`."""


LOCAL = Spelling(
    attention_norm="input_layernorm.weight",
    dense_norm="pre_mlp_layernorm.weight",
    expert=f"local_experts.{EXPERT}.{{part}}.weight",
)
"""megatron-core's own layers: a module per norm and per expert."""
FUSED = Spelling(
    attention_norm="self_attention.linear_qkv.layer_norm_weight",
    dense_norm="mlp.linear_fc1.layer_norm_weight",
    expert=f"{{part}}.weight{EXPERT}",
)
"""Transformer Engine's: a norm is part of the linear behind it, experts are parameters of one module."""

_PART = "{part}.weight"


def param_mappings(
    architecture: Architecture, *, merged: bool = False, spelling: Spelling = LOCAL
) -> list[ParamMapping]:
    """List every weight of the whole model, in a fixed order.

    Args:
        architecture: of the model.
        merged: as a file has them that stacks all experts of a layer in one tensor.
        spelling: of our names.
    """
    names, table = architecture.names, (architecture.vocabulary, architecture.hidden)
    mappings: list[ParamMapping] = [
        EmbeddingRows.of(
            "embedding.word_embeddings.weight", architecture.embedding_name, table, place="first"
        )
    ]
    for layer in range(architecture.layers):
        ours, theirs = f"decoder.layers.{LAYER}.", names.layer.format(layer=layer)
        inside: list[ParamMapping] = [
            _norm(architecture, f"{ours}{spelling.attention_norm}", f"{theirs}{names.attention_norm}"),
            *_attention(architecture, ours, theirs),
            _norm(
                architecture,
                f"{ours}{LOCAL.dense_norm if architecture.is_mixture(layer) else spelling.dense_norm}",
                f"{theirs}{names.feed_forward_norm}",
            ),
            *(
                _mixture(architecture, f"{ours}mlp.", theirs, merged=merged, spelling=spelling)
                if architecture.is_mixture(layer)
                else _gated(
                    f"{ours}mlp.{_PART}",
                    theirs,
                    names.feed_forward,
                    (architecture.feed_forward, architecture.hidden),
                )
            ),
        ]
        mappings += [dataclasses.replace(mapping, layer=layer) for mapping in inside]
    final = _norm(architecture, "decoder.final_layernorm.weight", names.final_norm)
    mappings.append(dataclasses.replace(final, place="last"))
    if not architecture.tied:
        mappings.append(HeadRows.of("output_layer.weight", f"{names.head}.weight", table))
    return mappings


def hf_shapes(architecture: Architecture, *, merged: bool = False) -> dict[str, Shape]:
    """Return the name and shape of every tensor of a Hugging Face folder; see `param_mappings`."""
    mappings = param_mappings(architecture, merged=merged)
    return {name: shape for mapping in mappings for name, shape in mapping.stored.items()}


def local_params(
    architecture: Architecture, shard: Shard, *, merged: bool = False, spelling: Spelling = LOCAL
) -> Iterator[tuple[str, ParamMapping]]:
    """Yield (local name, mapping of this rank's part) of every tensor that a rank holds, in a fixed order.

    Args:
        architecture: of the model.
        shard: the rank's place in it.
        merged: see `param_mappings`.
        spelling: of our names.
    """
    for mapping in param_mappings(architecture, merged=merged, spelling=spelling):
        name = mapping.local_name(shard, architecture.num_experts)
        if name is not None:
            yield name, mapping.share(shard)
    head = second_head(architecture, shard)
    if head is not None:
        yield head.target, head


def second_head(architecture: Architecture, shard: Shard) -> ParamMapping | None:
    """Return the rank's slice of a tied head, where its embedding does not hold that slice.

    A tied head is no tensor of its own in a file; such a rank reads the slice a second time.
    """
    if not architecture.tied or shard.embeds_head(architecture.vocabulary):
        return None
    table = (architecture.vocabulary, architecture.hidden)
    return HeadRows.of("output_layer.weight", architecture.embedding_name, table).share(shard)


def is_quantized(mapping: ParamMapping, architecture: Architecture, fp8: Fp8Options | None) -> bool:
    """Say whether a tensor is a matrix of attention or feed-forward that is held in FP8."""
    if fp8 is None or mapping.layer is None or not _MATRIX.search(mapping.target):
        return False
    return fp8.quantizes(mapping.layer, architecture.layers)


def num_local_bytes(
    architecture: Architecture, shard: Shard, dtype: torch.dtype, fp8: Fp8Options | None = None
) -> int:
    """Return the bytes of all parameters that `build_model` allocates on a rank, with their FP8 scales.

    Args:
        architecture: of the model.
        shard: the rank's place in it.
        dtype: of what is not quantised.
        fp8: how its matrices are held; None: in `dtype`.
    """
    return sum(
        num_param_bytes(architecture, mapping, dtype, fp8) for _, mapping in local_params(architecture, shard)
    )


def num_param_bytes(
    architecture: Architecture, mapping: ParamMapping, dtype: torch.dtype, fp8: Fp8Options | None = None
) -> int:
    """Return the bytes of one tensor of a rank, with its FP8 scales; 0 for what is no parameter.

    Args:
        architecture: of the model.
        mapping: the rank's part of it.
        dtype: of what is not quantised.
        fp8: see `num_local_bytes`.
    """
    if not mapping.is_parameter:
        return 0
    if fp8 is not None and is_quantized(mapping, architecture, fp8):
        scales = scale_shape(mapping.joined_shape, SCALINGS[fp8.recipe].weights)
        return mapping.elements + 4 * math.prod(scales)
    return mapping.elements * dtype.itemsize


def _norm(architecture: Architecture, ours: str, theirs: str, width: int | None = None) -> Copy:
    """Map the weight of a norm over the hidden states, or over `width` elements."""
    fresh = 0.0 if architecture.zero_centered_norms else 1.0
    return Copy.of(ours, f"{theirs}.weight", (width or architecture.hidden,), fill=fresh)


def _attention(architecture: Architecture, ours: str, theirs: str) -> list[ParamMapping]:
    """List the weights of one attention layer; both prefixes are the layer's."""
    names, width = architecture.names, architecture.hidden
    heads = Heads(heads=architecture.heads, groups=architecture.query_groups, head_dim=architecture.head_dim)
    target = f"{ours}self_attention."
    mappings: list[ParamMapping] = []
    for kind in ("weight", "bias") if architecture.qkv_bias else ("weight",):
        tail = (width,) if kind == "weight" else ()
        fill = None if kind == "weight" else 0.0
        name = f"{target}linear_qkv.{kind}"
        if len(names.qkv) == 1:
            source = {f"{theirs}{names.qkv[0]}.{kind}": (sum(heads.rows), *tail)}
            mappings.append(FusedQkv(target=name, sources=source, fill=fill, shape=heads))
        else:
            parts = zip(names.qkv, heads.rows, strict=True)
            sources = {f"{theirs}{part}.{kind}": (rows, *tail) for part, rows in parts}
            mappings.append(Qkv(target=name, sources=sources, fill=fill, shape=heads))
    out = {f"{theirs}{names.attention_out}.weight": (width, heads.query_rows)}
    mappings.append(Copy(target=f"{target}linear_proj.weight", sources=out, axis=1))
    if architecture.qk_norm:
        for part, norm in (("q", names.query_norm), ("k", names.key_norm)):
            of_head = _norm(
                architecture, f"{target}{part}_layernorm.weight", f"{theirs}{norm}", architecture.head_dim
            )
            mappings.append(of_head)
    return mappings


def _mixture(
    architecture: Architecture, ours: str, theirs: str, *, merged: bool, spelling: Spelling
) -> list[ParamMapping]:
    """List the weights of one mixture layer: router, experts, shared expert; see `param_mappings`."""
    names, experts, width = architecture.names, architecture.experts, architecture.hidden
    assert experts is not None, "the layer is a mixture"
    router = (experts.number, width)
    mappings: list[ParamMapping] = [Copy.of(f"{ours}router.weight", f"{theirs}{names.router}.weight", router)]
    if experts.has_bias:
        target, source = f"{ours}router.expert_bias", f"{theirs}{names.router_bias}"
        mappings.append(Copy.of(target, source, router[:1], fill=0.0, is_parameter=False))
    inner = f"{ours}experts.{spelling.expert}"
    shape = (experts.feed_forward, width)
    for expert in range(experts.number):
        if merged:
            own = _gated(inner, theirs, names.merged_experts, shape, suffix="")
            stack = experts.number
        else:
            gate, up, down = (name.format(expert=expert) for name in names.expert)
            own, stack = _gated(inner, theirs, (gate, up, down), shape), 0
        mappings += [dataclasses.replace(mapping, expert=expert, stack=stack) for mapping in own]
    if experts.shared_feed_forward:
        shape = (experts.shared_feed_forward, width)
        mappings += _gated(f"{ours}shared_experts.{_PART}", theirs, names.shared_expert, shape)
    return mappings


def _gated(
    ours: str, theirs: str, names: Gated, shape: tuple[int, int], suffix: str = ".weight"
) -> list[ParamMapping]:
    """List the two weights of a gated feed-forward block; `linear_fc1` holds the gate, then the up rows.

    Args:
        ours: our name of the block's weights, with `{part}` for which.
        theirs: Hugging Face prefix of the layer.
        names: of gate, up and down behind it.
        shape: (width of the block, hidden size).
        suffix: ends the Hugging Face names.
    """
    gate, up, down = (f"{theirs}{name}{suffix}" for name in names)
    return [
        GatedPair(target=ours.replace("{part}", "linear_fc1"), sources={gate: shape, up: shape}),
        Copy(target=ours.replace("{part}", "linear_fc2"), sources={down: shape[::-1]}, axis=1),
    ]
