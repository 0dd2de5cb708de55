"""What of model and optimizer a rank saves: its shards, described once, and the values of the moment."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch import Tensor

from tide_megatron.checkpoint.planner import LocalShard, chunks_of
from tide_megatron.models.build import is_extra_state

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The one optimizer format both supported megatron-core lines can load into any layout."""

_KEYS = ("param", "exp_avg", "exp_avg_sq")
"""What Adam keeps for a parameter, by megatron-core's names."""


class ShardedState:
    """Model and optimizer as a checkpoint knows them."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        """Describe nothing yet: an optimizer may still be loaded, which moves its state."""
        self._model, self._optimizer = model, optimizer
        self._weights: dict[str, Any] = {}
        self.shards: list[LocalShard] = []
        """What this rank writes of tensors, once described."""
        self.objects: dict[str, Any] = {}
        """What this rank writes beside them (nothing, as long as no FP8 engine runs)."""

    def describe(self) -> None:
        """Describe shards and objects. Collective: it compares that every tensor is written once.

        From here on weights and optimizer state must be changed in place only.
        """
        metadata = _metadata(self._model)
        self._weights = self._model.sharded_state_dict(metadata=metadata)
        state = self._optimizer_state(with_tensors=True)
        for number, part in enumerate(_parts(self._optimizer)):
            if _is_sharded(part):
                own = state if len(_parts(self._optimizer)) == 1 else state[number]
                self.shards += _optimizer_shards(part, own.pop("param_state"))
        # Parts that are not sharded over ranks are whole in the state, as weights are.
        entries, _ = save_preprocess({"model": dict(self._weights), "optimizer": state})
        for entry in nested_values(entries):
            if is_main_replica(entry.replica_id):  # else another rank writes it
                if isinstance(entry, ShardedObject):
                    self.objects[entry.unique_key] = entry.data
                else:
                    self.shards.append(LocalShard.of(entry, entry.data))

    def common(self) -> dict[str, Any]:
        """Return what is the same on every rank and changes: schedules, counted updates. No collective."""
        state = {"optimizer": self._optimizer_state(with_tensors=False)}
        common: dict[str, Any] = save_preprocess(state, validate_access_integrity=False)[1]
        return common

    def _optimizer_state(self, *, with_tensors: bool) -> Any:
        """Return the optimizer's sharded state; sharded parts describe their tensors or leave them out."""
        metadata = _metadata(self._model)
        with contextlib.ExitStack() as stack:
            for part in _parts(self._optimizer):
                if _is_sharded(part):
                    stack.enter_context(_not_gathered(part, metadata, with_tensors=with_tensors))
            return self._optimizer.sharded_state_dict(self._weights, is_loading=False, metadata=metadata)


def loading_state(model: Any, optimizer: Any | None) -> dict[str, Any]:
    """Return what megatron-core loads into a model and its optimizer, if that is wanted. Collective.

    All but the tensors of `shards_to_load`, and what layers keep beside weights: it says nothing (no engine
    scales with a history), and each engine has its own.
    """
    metadata = _metadata(model)
    weights = model.sharded_state_dict(metadata=metadata)
    asked = {name: entry for name, entry in weights.items() if not is_extra_state(name)}
    if optimizer is None:
        return {"model": asked}
    with contextlib.ExitStack() as stack:
        for part in _parts(optimizer):
            if _is_sharded(part):
                stack.enter_context(_not_gathered(part, metadata, with_tensors=False))
        state = optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata)
    return {"model": asked, "optimizer": state}


def shards_to_load(model: Any, optimizer: Any) -> list[LocalShard]:
    """Return what this rank owns of masters and moments that are sharded over ranks, over the live tensors.

    megatron-core's own loader would read them whole on every rank, into 12 bytes of host memory a parameter.
    The optimizer has loaded the rest of its state before, which makes the tensors. Not a collective.
    """
    metadata = _metadata(model)
    weights = model.sharded_state_dict(metadata=metadata)
    shards: list[LocalShard] = []
    for part in _parts(optimizer):
        if _is_sharded(part):
            with _not_gathered(part, metadata, with_tensors=True):
                described = part.sharded_state_dict(weights)["param_state"]
            shards += _optimizer_shards(part, described, every_replica=True)
    return shards


def optimizer_steps(optimizer: Any) -> list[int]:
    """Return the updates that the optimizer has counted, over this rank's parameters, each number once."""
    inner = [part.optimizer for part in _parts(optimizer)]
    states = [state for one in inner for state in getattr(one, "state", {}).values()]
    groups = [group for one in inner for group in getattr(one, "param_groups", [])]
    for counting in (states, groups):  # fused Adams count in groups; torch's leaves what it loaded there
        found = {int(counted["step"]) for counted in counting if "step" in counted}
        if found:
            return sorted(found)
    return []


def _metadata(model: Any) -> dict[str, Any]:
    """Return the metadata that saving and loading share."""
    return {**SHARDING, "dp_cp_group": model.groups.dp_cp}


def _parts(optimizer: Any) -> list[Any]:
    """Return the optimizers of a chain, or the only one."""
    parts: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts


def _is_sharded(part: Any) -> bool:
    return hasattr(part, "gbuf_ranges")


@contextlib.contextmanager
def _not_gathered(part: Any, metadata: Mapping[str, Any], *, with_tensors: bool) -> Iterator[None]:
    """Let `part` describe its state over tensors without memory in place of gathered ones.

    Its own method would also collect garbage, for the sake of what it has gathered: 0.2 s of a small save.
    """

    def described(weights: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        state: dict[str, Any] = part.state_dict()
        if with_tensors:
            state["param_state"] = part.sharded_param_state_fully_reshardable(weights, False, dict(metadata))
        state["param_state_sharding_type"] = metadata["distrib_optim_sharding_type"]
        return state

    def without_memory(*_: Any, **__: Any) -> dict[Any, Any]:
        state: dict[Any, Any] = {}
        for number, maps in enumerate(part.gbuf_ranges):
            size = part.buffers[number].numel
            whole = {key: torch.empty(size, dtype=torch.float32, device="meta") for key in _KEYS}
            state[number] = {dtype: whole for dtype in maps}
        return state

    part.sharded_state_dict, part.get_parameter_state_dp_zero = described, without_memory
    try:
        yield
    finally:
        del part.sharded_state_dict, part.get_parameter_state_dp_zero


def _optimizer_shards(
    part: Any, described: Mapping[int, Any], *, every_replica: bool = False
) -> Iterator[LocalShard]:
    """Yield what this rank owns of the parameters that `described` lists in buffer order.

    What several tensor ranks own alike is one rank's to write, and every one's to read.
    """
    number = 0
    for buffer, maps in zip(part.buffers, part.gbuf_ranges, strict=True):
        owned = {
            parameter: ranges["param"]
            for buckets in maps.values()
            for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()
        }
        for parameter, (first, _, _) in buffer.param_index_map.items():
            if parameter in owned:
                live = part._get_main_param_and_optimizer_states(parameter)
                for key in _KEYS:
                    entries = {"entry": described[number][key]}
                    apply_factories(entries)  # one parameter may be written as several tensors
                    for entry in nested_values(entries):
                        # Over data ranks each has its own part, whatever the last number says.
                        if any(entry.replica_id[:-1]) and not every_replica:
                            continue
                        yield from _parameter_shards(entry, first, owned[parameter], live[key].detach())
            number += 1


def _parameter_shards(entry: ShardedTensor, first: int, owned: Any, live: Tensor) -> Iterator[LocalShard]:
    """Yield the chunks of one parameter's state.

    Args:
        entry: what the parameter's state, or a part of it, is written as; a view of the described buffer.
        first: where the parameter begins in that buffer.
        owned: range of the parameter that this rank owns.
        live: the owned elements, flat.
    """
    assert entry.data.is_contiguous(), f"{entry.key} is no run of its parameter's elements"
    begin = entry.data.storage_offset() - first
    start, stop = max(owned.start - begin, 0), min(owned.end - begin, entry.data.numel())
    done, extra = start, entry.prepend_axis_num
    for offsets, sizes in chunks_of(entry.local_shape, start, stop):
        own = entry.global_offset[extra:]
        yield LocalShard(
            name=entry.key,
            shape=tuple(entry.global_shape),
            offsets=(*entry.global_offset[:extra], *(a + b for a, b in zip(own, offsets, strict=True))),
            sizes=(*(1 for _ in range(extra)), *sizes),
            source=live,
            start=done + begin - owned.start,
        )
        done += math.prod(sizes)
