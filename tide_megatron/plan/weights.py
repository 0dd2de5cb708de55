"""The bytes of a rank's weights without a walk through all of them: layers of one kind weigh the same.

`models.params.num_local_bytes` lists every tensor of a rank, which for a mixture of 256 experts takes a tenth
of a second; a search asks for thousands of ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch

from tide_megatron.models.architecture import Architecture
from tide_megatron.models.mapping import ParamMapping
from tide_megatron.models.params import num_param_bytes, param_mappings, second_head
from tide_megatron.models.precision import Fp8Options
from tide_megatron.models.shard import Shard


def weight_bytes(
    architecture: Architecture, shard: Shard, dtype: torch.dtype, fp8: Fp8Options | None = None
) -> int:
    """Return what `num_local_bytes` returns.

    Args:
        architecture: of the model.
        shard: the rank's place in it.
        dtype: of what is not quantised.
        fp8: how its matrices are held; None: in `dtype`.
    """
    layers = range(shard.first_layer, shard.first_layer + shard.num_layers)
    kinds = Counter(_kind(architecture, layer, fp8) for layer in layers)
    first = {_kind(architecture, layer, fp8): layer for layer in reversed(layers)}
    # Which slices and experts a rank holds changes no number of bytes.
    cut = dataclasses.replace(shard, tensor_rank=0, expert_tensor_rank=0, expert_rank=0, head=None)
    found = sum(
        number * _layer_bytes(architecture, _of_layer(cut, first[kind]), dtype, fp8)
        for kind, number in kinds.items()
    )
    ends = _of(architecture, _by_layer(architecture)[None], shard, dtype, fp8)
    head = second_head(architecture, shard)
    return found + ends + (0 if head is None else num_param_bytes(architecture, head, dtype, fp8))


def _kind(architecture: Architecture, layer: int, fp8: Fp8Options | None) -> tuple[bool, bool]:
    is_quantized = fp8 is not None and fp8.quantizes(layer, architecture.layers)
    return architecture.is_mixture(layer), is_quantized


def _of_layer(shard: Shard, layer: int) -> Shard:
    return dataclasses.replace(shard, first_layer=layer, num_layers=1, is_first=False, is_last=False)


@functools.lru_cache(maxsize=2**12)
def _layer_bytes(architecture: Architecture, shard: Shard, dtype: torch.dtype, fp8: Fp8Options | None) -> int:
    """Return the bytes of a stage of one layer, without its ends."""
    return _of(architecture, _by_layer(architecture)[shard.first_layer], shard, dtype, fp8)


def _of(
    architecture: Architecture,
    mappings: Sequence[ParamMapping],
    shard: Shard,
    dtype: torch.dtype,
    fp8: Fp8Options | None,
) -> int:
    return sum(
        num_param_bytes(architecture, mapping.share(shard), dtype, fp8)
        for mapping in mappings
        if mapping.local_name(shard, architecture.num_experts) is not None
    )


@functools.lru_cache(maxsize=16)
def _by_layer(architecture: Architecture) -> Mapping[int | None, Sequence[ParamMapping]]:
    """Return a model's tensors by layer; None: those of no layer."""
    found: defaultdict[int | None, list[ParamMapping]] = defaultdict(list)
    for mapping in param_mappings(architecture):
        found[mapping.layer].append(mapping)
    return found
