"""The two values that travel through a step: a `Batch` of clean examples and its `Noised` form.

They hold what every later stage needs and nothing about models, layouts or losses. Examples are padded when
they are loaded, in two ways that differ in what the model learns: end-of-text tokens that fill the last block
are targets like any other (that is how a block-diffusion model learns to stop inside a block); pads up to a
fixed length are never masked (spec section 1 item 10). Blocks first, then the length. A text that was cut has
no end: pads fill its last block.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tide_megatron.base.errors import DataError
from tide_megatron.diffusion.alignment import (
    RowAlignment,
    TeacherInput,
    TeacherTokens,
    link_side,
    read_side,
    same_rows,
)

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
    sides: Mapping[str, TeacherTokens] = dataclasses.field(default_factory=dict)
    """Teacher name -> the same samples in that teacher's own tokens; teachers that share the student's
    tokens have none."""
    taught: Mapping[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)
    """Teacher name -> whether it teaches each sample; a teacher without an entry teaches all."""

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
        taught = values.pop("taught")
        tensors = {name: value.to(device) for name, value in values.items()}
        moved = Batch(**tensors, sides=sides, taught=taught)
        for name in ("host_lengths", "num_maskable", "fingerprint"):
            object.__setattr__(moved, name, getattr(self, name))
        return moved

    def chosen(self, samples: Tensor, teacher: str) -> Batch:
        """Return some of the samples, as one teacher reads them.

        Args:
            samples: [chosen] int64 indices, ascending.
            teacher: its name; other teachers' tokens are left out.
        """
        side = self.sides.get(teacher)
        return Batch(
            **{
                field.name: getattr(self, field.name)[samples]
                for field in dataclasses.fields(self)
                if field.name not in ("sides", "taught")
            },
            sides={} if side is None else {teacher: side.chosen(samples)},
        )


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

    def reading(self, teacher: str) -> TeacherInput:
        """Return what a teacher reads of `part`: its own side of the batch, or the student's tokens."""
        part = self.part(teacher)
        return part._readings.get(teacher) or part._shared_reading

    def part(self, teacher: str) -> Noised:
        """Return the samples that a teacher teaches, under the same masks.

        Where it teaches none it reads the first one, of which nothing is asked: no rank of a replica can
        forward alone.
        """
        samples = self._taught(teacher)
        if samples is None:
            return self
        if teacher not in self._parts:
            if len(samples):
                read, masked = samples, self.masked[samples]
            else:
                read, masked = samples.new_zeros(1), torch.zeros_like(self.masked[:1])
            batch = self.batch.chosen(read, teacher)
            self._parts[teacher] = Noised(batch=batch, time=self.time[read], masked=masked)
        return self._parts[teacher]

    def _taught(self, teacher: str) -> Tensor | None:
        """Return which samples a teacher teaches, [samples] int64 indices; None: all."""
        if teacher not in self.batch.taught:
            return None
        return torch.tensor(self.batch.taught[teacher], device=self.masked.device).nonzero()[:, 0]

    @functools.cached_property
    def _parts(self) -> dict[str, Noised]:
        return {}

    @functools.cached_property
    def _shared_reading(self) -> TeacherInput:
        place = torch.arange(self.masked.shape[1], device=self.masked.device).expand_as(self.masked)
        return TeacherInput(
            ids=self.batch.ids,
            lengths=self.batch.lengths,
            masked=self.masked,
            targets=self.masked,
            index=self.row_index,
            host_lengths=self.batch.host_lengths,
            unit=place,
        )

    def link(self, teacher: str) -> RowAlignment:
        """Return how a teacher's rows join the student's."""
        part, samples = self.part(teacher), self._taught(teacher)
        link = part._links.get(teacher) or part._shared_link
        if samples is None:
            return link
        is_taught = torch.zeros_like(self.time, dtype=torch.bool).index_fill(0, samples, True)
        return link.within(samples, is_taught[self.row_index[0]].nonzero()[:, 0])

    @functools.cached_property
    def _readings(self) -> dict[str, TeacherInput]:
        return {name: read_side(side, self.masked) for name, side in self.batch.sides.items()}

    @functools.cached_property
    def _links(self) -> dict[str, RowAlignment]:
        return {
            name: link_side(side, self.batch.ids, self.masked, self._readings[name].targets)
            for name, side in self.batch.sides.items()
        }

    @functools.cached_property
    def _shared_link(self) -> RowAlignment:
        sample, position = self.row_index
        return same_rows(self.batch.ids[sample, position], sample)


def pad_to_blocks(
    ids: Sequence[int], labels: Sequence[int], block_size: int, eos_id: int
) -> tuple[list[int], list[int]]:
    """Extend an example to the next multiple of `block_size` with `eos_id`, in ids and labels alike.

    An exact multiple gets nothing. Returns new (ids, labels).
    """
    assert len(ids) == len(labels), f"{len(ids)} ids but {len(labels)} labels"
    filling = [eos_id] * (-len(ids) % block_size)
    return [*ids, *filling], [*labels, *filling]


def pad_to_length(
    ids: Sequence[int], labels: Sequence[int], length: int, pad_id: int
) -> tuple[list[int], list[int]]:
    """Extend an example to `length` tokens with `pad_id`, labelled IGNORED. Returns new (ids, labels).

    Raises:
        DataError: the example is longer than `length`.
    """
    assert len(ids) == len(labels), f"{len(ids)} ids but {len(labels)} labels"
    missing = length - len(ids)
    if missing < 0:
        raise DataError(
            f"an example of {len(ids)} tokens (blocks filled up) exceeds the fixed length of {length}; "
            "raise the length or prepare shorter records"
        )
    return [*ids, *[pad_id] * missing], [*labels, *[IGNORED] * missing]
