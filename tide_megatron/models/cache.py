"""Keys and values that a decoder keeps: one row for each reply under way, a slot for each token.

Rows are allocated once and written in place: a pass puts its tokens' keys and values into their slots and
reads the row from its first slot on, so nothing is joined or copied. What a later pass writes again (the
block being denoised) simply overwrites.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tide_megatron.models.build import TideModel


class KeyValueCache:
    """The keys and values of all layers of one model, on its device."""

    def __init__(self, model: TideModel, rows: int, slots: int) -> None:
        """Allocate zeros: what nobody wrote must not be NaN, which no mask would hide.

        Args:
            model: whose.
            rows: replies at a time.
            slots: tokens of the longest one.
        """
        architecture = model.architecture
        self.unread = slots
        """A slot behind all others, for what is fed only to fill up a pass."""
        shape = (architecture.layers, 2, rows, slots + 1, architecture.query_groups, architecture.head_dim)
        self._stored = torch.zeros(shape, dtype=model.config.params_dtype, device=model.head_weight.device)

    def window(self, rows: list[int], slots: Tensor, keys: int) -> CacheWindow:
        """Return what a pass writes and reads.

        Args:
            rows: [samples] the cache's row of each sample.
            slots: [samples, tokens] int64 on the host: where each token's keys and values go.
            keys: so many slots are read, from the first on.
        """
        device, first = self._stored.device, rows[0]
        is_run = rows == list(range(first, first + len(rows)))
        read = slice(first, first + len(rows)) if is_run else torch.tensor(rows, device=device)
        start, stop = int(slots[0, 0]), int(slots[0, -1]) + 1
        if is_run and bool((slots == torch.arange(start, start + slots.shape[1])).all()):
            return CacheWindow(stored=self._stored, write=(read, slice(start, stop)), read=read, keys=keys)
        each = torch.tensor(rows, device=device)[:, None]
        return CacheWindow(stored=self._stored, write=(each, slots.to(device)), read=read, keys=keys)

    def move(self, source: int, target: int) -> None:
        """Copy a row over another one."""
        self._stored[:, :, target] = self._stored[:, :, source]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheWindow:
    """One pass's part of a cache: `attention.Memory`."""

    stored: Tensor
    """[layers, 2, rows, slots, groups, head_dim]."""
    write: tuple[slice | Tensor, slice | Tensor]
    """Rows and slots of the pass's tokens."""
    read: slice | Tensor
    """Rows of its samples."""
    keys: int

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values in place; see `attention.Memory`."""
        found = []
        for place, states in zip(self.stored[layer - 1], (key, value), strict=True):
            place[self.write] = states.transpose(0, 1)
            found.append(place[self.read, : self.keys].transpose(0, 1))
        return found[0], found[1]
