"""From the host to a device in one copy that nobody waits for.

A copy from ordinary memory makes the host wait until the device has done all it was given before, and each
tensor is a copy of its own. So the tensors of a whole value are written behind each other into page-locked
memory, and travel together while the host goes on. The memory is torch's to give and to take back: it knows
when the copy is over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Value = TypeVar("Value")

_ALIGNED = 16
"""Bytes that every tensor's place is a multiple of: more than any dtype's size."""


def moved(value: Value, device: torch.device) -> Value:
    """Return a value whose tensors are on a device; itself where that is the CPU. Waits for nothing.

    Tensors that are one on the host are one there, too.

    Args:
        value: dataclasses, mappings, lists and tuples with tensors on the CPU in them, however deep. What a
            dataclass remembers beside its fields (cached properties) stays behind.
        device: where to.
    """
    if device.type == "cpu":
        return value
    found = {id(tensor): tensor for tensor in tensors_in(value)}
    tensors = list(found.values())
    sent = as_bytes(tensors, is_pinned=device.type == "cuda")
    arrived = from_bytes(sent.to(device, non_blocking=True), tensors)
    by_identity = dict(zip(found, arrived, strict=True))
    return cast(Value, _replaced(value, lambda tensor: by_identity[id(tensor)]))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors of a value, in a fixed order; one that it holds twice comes twice."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _replaced(value: Any, new: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with other tensors in it; parts without any stay the same objects."""
    if isinstance(value, Tensor):
        return new(value)
    if next(tensors_in(value), None) is None:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _replaced(getattr(value, name), new) for name in names})
    if isinstance(value, Mapping):
        return {key: _replaced(part, new) for key, part in value.items()}
    return type(value)([_replaced(part, new) for part in value])


def as_bytes(tensors: Sequence[Tensor], *, is_pinned: bool = False) -> Tensor:
    """Write tensors of the CPU behind each other, [bytes] uint8; what is repeated along an axis is kept once.

    Args:
        tensors: of any dtypes and strides.
        is_pinned: into page-locked memory, from which a copy need not be waited for.
    """
    parts = [_kept(tensor) for tensor in tensors]
    whole = torch.empty(sum(_place(part.nbytes) for part in parts), dtype=torch.uint8, pin_memory=is_pinned)
    for room, part in zip(from_bytes(whole, parts), parts, strict=True):
        room.copy_(part)
    return whole


def from_bytes(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Find the tensors again that `as_bytes` wrote, as parts of its bytes, on their device.

    Args:
        whole: [bytes] uint8.
        like: what was written: dtypes, shapes and strides.
    """
    found, start = [], 0
    for tensor in like:
        kept = _kept(tensor)
        part = whole[start : start + kept.nbytes].view(kept.dtype).view(kept.shape)
        found.append(part.expand(tensor.shape))
        start += _place(kept.nbytes)
    return found


def _kept(tensor: Tensor) -> Tensor:
    """Return a tensor without its repetitions: one of each axis along which it does not move."""
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
    return tensor[once] if once else tensor


def _place(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
