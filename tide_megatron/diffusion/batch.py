"""The two values that travel through a step: a `Batch` of clean examples and its `Noised` form.

They hold what every later stage needs and nothing about models, layouts or losses.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from tide_megatron.diffusion.link import Link, Reading, link_side, read_side, same_rows
from tide_megatron.diffusion.side import Side

IGNORED = -100
"""Label of a position that is never masked: prompt and padding (spec section 1)."""


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
    """[samples, length] int64: equal to `ids` where a token may be masked, else IGNORED."""
    reply_bytes: Tensor
    """[samples] int64: UTF-8 bytes of reply text (what NLL per byte divides by)."""
    sides: Mapping[str, Side] = dataclasses.field(default_factory=dict)
    """Teacher name -> the same samples in that teacher's own tokens; teachers that share the student's
    tokens have none."""

    @property
    def maskable(self) -> Tensor:
        """[samples, length] bool: positions that may be masked."""
        return self.labels != IGNORED

    @property
    def lengths(self) -> Tensor:
        """[samples] int64: tokens up to the last maskable one; behind it there are only pads."""
        place = torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device)
        return (self.maskable * place).amax(dim=1)

    @functools.cached_property
    def host_lengths(self) -> tuple[int, ...]:
        """`lengths` as plain numbers."""
        return tuple(self.lengths.tolist())

    @functools.cached_property
    def num_maskable(self) -> int:
        """How many tokens of all samples may be masked."""
        return int(self.maskable.sum())

    @functools.cached_property
    def fingerprint(self) -> int:
        """Number of the samples and their epochs, in order: two batches share it when they hold the same."""
        return zlib.crc32(torch.stack([self.sample_ids, self.epochs]).cpu().numpy().tobytes())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, with the plain numbers that would cost a wait there."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sides = {name: side.to(device) for name, side in values.pop("sides").items()}
        moved = Batch(**{name: value.to(device) for name, value in values.items()}, sides=sides)
        for name in ("host_lengths", "num_maskable", "fingerprint"):
            object.__setattr__(moved, name, getattr(self, name))
        return moved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noised:
    """A batch after masking."""

    batch: Batch
    time: Tensor
    """[samples] fp32 noise level t in [epsilon, 1]."""
    masked: Tensor
    """[samples, length] bool: positions the model must predict (a subset of maskable)."""

    @functools.cached_property
    def row_index(self) -> tuple[Tensor, Tensor]:
        """([rows], [rows]) int64: sample and position of each masked row, in (sample, position) order.

        The host waits for the device to learn how many there are, once.
        """
        sample, position = self.masked.nonzero(as_tuple=True)
        return sample, position

    def reading(self, teacher: str) -> Reading:
        """Return what a teacher reads: its own side of the batch, or the student's tokens."""
        return self._readings.get(teacher) or self._shared_reading

    @functools.cached_property
    def _shared_reading(self) -> Reading:
        place = torch.arange(self.masked.shape[1], device=self.masked.device).expand_as(self.masked)
        return Reading(
            ids=self.batch.ids,
            lengths=self.batch.lengths,
            masked=self.masked,
            asked=self.masked,
            index=self.row_index,
            host_lengths=self.batch.host_lengths,
            unit=place,
        )

    def link(self, teacher: str) -> Link:
        """Return how a teacher's rows join the student's."""
        if teacher in self._links:
            return self._links[teacher]
        return self._shared_link

    @functools.cached_property
    def _readings(self) -> dict[str, Reading]:
        return {name: read_side(side, self.masked) for name, side in self.batch.sides.items()}

    @functools.cached_property
    def _links(self) -> dict[str, Link]:
        return {
            name: link_side(side, self.batch.ids, self.masked, self._readings[name].asked)
            for name, side in self.batch.sides.items()
        }

    @functools.cached_property
    def _shared_link(self) -> Link:
        sample, position = self.row_index
        return same_rows(self.batch.ids[sample, position], sample)
