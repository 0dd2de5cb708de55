"""The two values that travel through a step: a `Batch` of clean examples and its `Noised` form.

They hold what every later stage needs and nothing about models, layouts or losses.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is never hidden: prompt and padding (spec section 1)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's microbatch of clean examples, right-padded to a common length."""

    sample_ids: Tensor
    """[samples] int64: row number in the data set; with `epochs` the key of all noise."""
    epochs: Tensor
    """[samples] int64: how often the data set was read before this sample."""
    ids: Tensor
    """[samples, length] int64 student tokens."""
    labels: Tensor
    """[samples, length] int64: equal to `ids` where a token may be hidden, else IGNORED."""
    reply_bytes: Tensor
    """[samples] int64: UTF-8 bytes of reply text (what NLL per byte divides by)."""

    @property
    def maskable(self) -> Tensor:
        """[samples, length] bool: positions that may be hidden."""
        return self.labels != IGNORED

    @property
    def lengths(self) -> Tensor:
        """[samples] int64: tokens up to the last maskable one; behind it there are only pads."""
        place = torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device)
        return (self.maskable * place).amax(dim=1)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)}
        return Batch(**moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noised:
    """A batch after hiding."""

    batch: Batch
    time: Tensor
    """[samples] fp32 noise level t in [epsilon, 1]."""
    hidden: Tensor
    """[samples, length] bool: positions the model must predict (a subset of maskable)."""

    @property
    def row_index(self) -> tuple[Tensor, Tensor]:
        """([rows], [rows]) int64: sample and position of each hidden row, in (sample, position) order."""
        sample, position = self.hidden.nonzero(as_tuple=True)
        return sample, position
