"""Where every weight of a model stands in a Megatron checkpoint: megatron-core says so itself.

A `torch_dist` checkpoint holds each tensor whole under a name of megatron-core's choosing (layers of one kind
stacked, experts stacked, a norm under the name of the layer behind it), whatever layout wrote it. We build
the uncut model without any memory (fake tensors) and take its `sharded_state_dict`: so other Megatron tools
find what their own models ask for, and no table of names of ours can go stale.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tide_megatron.platform  # noqa: F401 - before megatron

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tide_megatron.base.device import Device
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.build import TideModel
from tide_megatron.models.mapping import HeadRows, ParamMapping
from tide_megatron.models.params import local_params
from tide_megatron.models.spec import ModelOptions
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of ours: the Hugging Face tensors it is made of, and its place in the checkpoint."""

    name: str
    """Our name, of the uncut model."""
    piece: ParamMapping
    entry: ShardedTensor | ShardedTensorFactory
    """Without data."""

    def filled(self, tensor: Tensor) -> ShardedTensor | ShardedTensorFactory:
        """Return the entry with a tensor to save, or to load into; only one rank may hold it."""
        if isinstance(self.entry, ShardedTensor):
            return dataclasses.replace(self.entry, data=tensor, dtype=tensor.dtype, replica_id=0)
        return dataclasses.replace(self.entry, data=tensor, replica_id=0)

    def parts(self, tensor: Tensor | None = None) -> list[ShardedTensor]:
        """Return what of the checkpoint's tensors it is, over its data where they are given."""
        if tensor is None:
            tensor = torch.empty(self.piece.joined_shape, device="meta")
        entry = self.filled(tensor)
        return [entry] if isinstance(entry, ShardedTensor) else list(entry.build())

    def merged(self, parts: list[Tensor]) -> Tensor:
        """Make our tensor of those parts."""
        merged: Tensor = parts[0] if isinstance(self.entry, ShardedTensor) else self.entry.merge_fn(parts)
        return merged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """A whole model's."""

    slots: list[Slot]
    """In the order of the weight table."""
    extra: dict[str, ShardedObject]
    """What megatron-core's layers write beside weights (nothing, as long as no FP8 engine runs)."""


def slots_of(architecture: Architecture, device: Device, *, merged: bool = False) -> Slots:
    """Ask megatron-core for the places of all weights. All ranks call it together (process groups).

    Args:
        architecture: of the whole model.
        device: where models of this process are built.
        merged: whether the Hugging Face tensors are those of `param_mappings(Architecture, merged=True)`.
    """
    layout = Layout()
    groups = make_groups(layout)
    with FakeTensorMode():
        model = TideModel(architecture, groups, ModelOptions(device=device, layout=layout))
        found: dict[str, Any] = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        shard = model.shard
    slots = []
    for name, piece in local_params(architecture, shard, merged=merged):
        entry = found.pop(name).without_data()
        if isinstance(piece, HeadRows):  # our slice of a head is no layer of megatron-core's; its own says so
            entry = dataclasses.replace(entry, allow_shape_mismatch=True)
        slots.append(Slot(name=name, piece=piece, entry=entry))
    assert all(isinstance(value, ShardedObject) for value in found.values()), f"no weights: {list(found)}"
    return Slots(slots=slots, extra=found)
