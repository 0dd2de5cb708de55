"""Weights and optimizer state in pieces: what this rank owns, where it lies in the whole, and a copy of it.

megatron-core writes the fully reshardable format by gathering masters and moments of all parameters on every
rank, several times over, while training waits (30 GB for 0.6B parameters). The same entries of the same names
can be written by each rank from its own shard, since a checkpoint's tensor may be cut into any boxes; reading
is megatron-core's own, on any layout. Weights go the same way, which spares planning them anew at each save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tide_megatron.platform  # noqa: F401 - before megatron

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from tide_megatron.checkpoint.boxes import boxes_of

KEYS = ("param", "exp_avg", "exp_avg_sq")
"""What Adam keeps for a parameter, by megatron-core's names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of a checkpoint's tensor, which this rank owns."""

    name: str
    """Of the tensor in the checkpoint."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    source: Tensor
    """Flat live tensor that holds the box's elements in order."""
    start: int
    """First of them."""

    @classmethod
    def of(cls, part: ShardedTensor, values: Tensor) -> Piece:
        """Return all of a part of a checkpoint's tensor.

        Args:
            part: where it lies.
            values: contiguous, what it holds.
        """
        return cls(
            name=part.key,
            shape=tuple(part.global_shape),
            offsets=tuple(part.global_offset),
            sizes=(*(1 for _ in range(part.prepend_axis_num)), *part.local_shape),
            source=values.view(-1),
            start=0,
        )

    @property
    def values(self) -> Tensor:
        """The box's elements, flat, as they are now."""
        return self.source[self.start : self.start + math.prod(self.sizes)]


def split_weights(weights: Mapping[str, Any]) -> tuple[dict[str, Any], list[Piece]]:
    """Return a model's sharded state without its tensors, and those that this rank writes in pieces."""
    rest, pieces = {}, []
    for key, entry in weights.items():
        tensors = _tensors_of(entry)
        if not tensors:
            rest[key] = entry
        for tensor in tensors:
            if not any(tensor.replica_id):  # else another rank writes it
                live = tensor.data.detach()
                assert live.is_contiguous(), f"{tensor.key} is not contiguous"
                pieces.append(Piece.of(tensor, live))
    return rest, pieces


def split_optimizer(
    optimizer: Any, weights: Mapping[str, Any], metadata: Mapping[str, Any]
) -> tuple[Any, list[Piece]]:
    """Return the optimizer's sharded state without its large tensors, and these in pieces.

    Args:
        optimizer: megatron's; parts that are not sharded over ranks stay whole in the state.
        weights: the model's sharded state.
        metadata: as for `sharded_state_dict`.

    Returns:
        What is left for megatron-core to save, and this rank's pieces. No collective.
    """
    state = _state(optimizer, weights, metadata, with_tensors=True)
    pieces: list[Piece] = []
    for number, part in enumerate(_parts(optimizer)):
        if _is_sharded(part):
            pieces += _pieces(part, _state_of(state, optimizer, number).pop("param_state"))
    return state, pieces


def optimizer_rest(optimizer: Any, weights: Mapping[str, Any], metadata: Mapping[str, Any]) -> Any:
    """Return the first part of what `split_optimizer` does: pieces stay the same from save to save."""
    return _state(optimizer, weights, metadata, with_tensors=False)


def _state(
    optimizer: Any, weights: Mapping[str, Any], metadata: Mapping[str, Any], *, with_tensors: bool
) -> Any:
    """Return the optimizer's sharded state; its sharded parts describe their tensors or leave them out."""
    with contextlib.ExitStack() as stack:
        for part in _parts(optimizer):
            if _is_sharded(part):
                stack.enter_context(_not_gathered(part, metadata, with_tensors=with_tensors))
        return optimizer.sharded_state_dict(weights, is_loading=False, metadata=dict(metadata))


def _state_of(state: Any, optimizer: Any, number: int) -> Any:
    """Return the state of one optimizer of a chain."""
    return state if len(_parts(optimizer)) == 1 else state[number]


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
            whole = {key: torch.empty(size, dtype=torch.float32, device="meta") for key in KEYS}
            state[number] = {dtype: whole for dtype in maps}
        return state

    part.sharded_state_dict, part.get_parameter_state_dp_zero = described, without_memory
    try:
        yield
    finally:
        del part.sharded_state_dict, part.get_parameter_state_dp_zero


def _pieces(part: Any, described: Mapping[int, Any]) -> Iterable[Piece]:
    """Yield what this rank owns of the parameters that `described` lists in buffer order."""
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
                for key in KEYS:
                    entry = _tensors_of(described[number][key])
                    yield from _boxed(entry, first, owned[parameter], live[key].detach())
            number += 1


def _tensors_of(entry: Any) -> list[ShardedTensor]:
    """Return the tensors that a sharded tensor, or the factory of several, stands for."""
    box = {"entry": entry}
    apply_factories(box)
    return [tensor for tensor in nested_values(box) if isinstance(tensor, ShardedTensor)]


def _boxed(entries: list[ShardedTensor], first: int, owned: Any, live: Tensor) -> Iterator[Piece]:
    """Yield the boxes of one parameter's state.

    Args:
        entries: tensors that the parameter's state is written as; views of the described buffer.
        first: where the parameter begins in that buffer.
        owned: range of the parameter that this rank owns.
        live: the owned elements, flat.
    """
    for entry in entries:
        assert entry.data.is_contiguous(), f"{entry.key} is no run of its parameter's elements"
        if any(entry.replica_id[:-1]):  # another tensor rank writes it; over data ranks each has its own part
            continue
        begin = entry.data.storage_offset() - first
        start, stop = max(owned.start - begin, 0), min(owned.end - begin, entry.data.numel())
        done, extra = start, entry.prepend_axis_num
        for offsets, sizes in boxes_of(entry.local_shape, start, stop):
            own = entry.global_offset[extra:]
            yield Piece(
                name=entry.key,
                shape=tuple(entry.global_shape),
                offsets=(*entry.global_offset[:extra], *(a + b for a, b in zip(own, offsets, strict=True))),
                sizes=(*(1 for _ in range(extra)), *sizes),
                source=live,
                start=done + begin - owned.start,
            )
            done += math.prod(sizes)


class Staging:
    """Room for a copy of the pieces, kept from save to save: fresh memory costs as much as the copy.

    On CUDA the room is pinned, so that copies run at the bus's speed.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._room: dict[int, Tensor] = {}

    def copy(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces over copies of what they hold now; the copies hold until the next call."""
        sources = {id(piece.source): piece.source for piece in pieces}
        copies = {}
        for place, (key, source) in enumerate(sources.items()):
            room = self._room.get(place)
            if room is None or room.shape != source.shape or room.dtype != source.dtype:
                pinned = source.device.type == "cuda"
                room = self._room[place] = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
            copies[key] = room.copy_(source, non_blocking=True)
        if any(source.device.type == "cuda" for source in sources.values()):
            torch.cuda.synchronize()
        return [dataclasses.replace(piece, source=copies[id(piece.source)]) for piece in pieces]
