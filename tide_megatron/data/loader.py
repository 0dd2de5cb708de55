"""The loader: which samples a rank reads at a position of the run, as a pure function.

A position counts samples of all ranks together (`Clock.consumed`), so the data order has nothing to do with
how a step is cut: an update at position p takes positions p .. p + shards * accumulate * samples - 1, and
microbatch m of data shard r takes `samples` of them, from place (m * shards + r) * samples on. Another split
with the same product reads the same samples, and resuming is calling with a larger p: there is no state to
save.

An update's samples are dealt by length (`data.dealing`): a loss adds up items of the whole update, so that
nothing but the order of sums depends on who reads which.

Position q lies in epoch q // N; the order within an epoch depends on (seed, epoch) only. An update that
crosses an epoch's end goes on in the next epoch, so nothing is dropped, and each sample carries its own
epoch, which with the sample's number keys its noise.

Padding (spec section 1 item 10): end tokens up to a whole block, which are learnt; then pads up to the
microbatch's longest sample or to a fixed length, which are not. Ranks and microbatches may differ in length:
pads that a model would see, a bidirectional one or a teacher of a larger block, are hidden from it by its
view (`diffusion.views`), so no row depends on its batchmates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.data.blend import BlendedData
from tide_megatron.data.columns import CUT_COLUMN
from tide_megatron.data.dataset import PreparedData, Row
from tide_megatron.data.dealing import Dealt, Rungs, by_length, cut_by_budget, cut_into_packs
from tide_megatron.diffusion.alignment import TeacherTokens
from tide_megatron.diffusion.batch import IGNORED, Batch, pad_to_blocks, pad_to_length
from tide_megatron.parallel.layout import DataShard
from tide_megatron.text.chat import labels_of

Deal = Literal["length", "order"]
"""How an update's samples are shared out to microbatches: like beside like, or as they come."""
Readers = tuple[int, str]
"""How many ids the models that read some tokens all know, and the model that knows the fewest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideReading:
    """A teacher that reads a side of the data instead of the student's tokens."""

    side: str
    """Name of the side in the data."""
    block_size: int = 1
    """Fill the teacher's last block with its end tokens up to a multiple of this; 1: add none."""
    known: Readers | None = None
    """Refuse ids that the teacher does not know; None: nobody looks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """Microbatches of one data shard over one prepared data set, on the CPU.

    Raises:
        ConfigError: sizes that cannot be, or a fixed length below the longest sample.
    """

    columns: PreparedData | BlendedData
    samples: int
    """Samples per microbatch."""
    accumulate: int = 1
    """Microbatches per update and shard."""
    tokens: int | None = None
    """Cut an update, of as many samples, anew: into microbatches of at most so many positions of any model;
    None: as `samples` and `accumulate` say. Needs `deal` = length."""
    pack: bool = False
    """Models put several samples into one row of a view: what `tokens` has room for is counted so."""
    shard: DataShard = dataclasses.field(default_factory=DataShard)
    """Whose microbatches these are."""
    deal: Deal = "order"
    """How an update's samples are shared out."""
    seed: int = 0
    block_size: int = 1
    """Fill the last block with end tokens up to a multiple of this; 1: add none."""
    fixed_length: int | None = None
    """Pad every microbatch to this many tokens; None: to its own longest sample."""
    sides: Mapping[str, SideReading] = dataclasses.field(default_factory=dict)
    """Teacher name -> the side it reads; every batch carries them."""
    taught: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """Teacher name -> the sources whose samples it teaches; a teacher without an entry teaches all."""
    main: str | None = None
    """Read this side in the student's place (`of_teacher`); None: the student's tokens."""
    known: Readers | None = None
    """Refuse ids of the tokens in the student's place that some model which reads them does not know; None:
    nobody looks. An id outside a table would end a GPU's context without saying whose it is, so it is found
    here, before any device sees it."""

    def __post_init__(self) -> None:
        for name in ("samples", "accumulate", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is too few; use at least 1")
        if self.fixed_length is not None and self.fixed_length < self.longest:
            raise ConfigError(
                f"fixed_length: {self.fixed_length} is below the longest sample of {self.columns.name} "
                f"({self.longest} tokens in whole blocks of {self.block_size}); use {self.longest} or more"
            )
        if self.tokens is not None:
            self._check_budget(self.tokens)

    def _check_budget(self, tokens: int) -> None:
        if self.deal != "length":
            raise ConfigError("tokens: a budget of positions needs samples dealt by length; use deal=length")
        longest = max(rungs.lengths[-1] for rungs in self.rungs)
        if tokens < longest:
            raise ConfigError(
                f"tokens: {tokens} positions have no room for the longest sample of {self.columns.name} "
                f"({longest} with its pads); use {longest} or more"
            )

    @functools.cached_property
    def rungs(self) -> list[Rungs]:
        """The lengths that the samples of each model are padded to under a budget; sides behind the rest."""
        own = Rungs.of(self.columns.longest(self.main), self.block_size, self.fixed_length)
        return [
            own,
            *(Rungs.of(self.columns.longest(side.side), side.block_size) for side in self.sides.values()),
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample after its last block is filled."""
        return -(-self.columns.longest(self.main) // self.block_size) * self.block_size

    @property
    def update_samples(self) -> int:
        """Samples per update, over all shards and accumulation: what an update adds to the position."""
        return self.samples * self.accumulate * self.shard.size

    def microbatch(self, consumed: int, index: int) -> Batch:
        """Return the shard's microbatch `index` of the update that starts at position `consumed`."""
        samples, dealt = self.dealt(consumed)
        return self._batch(samples, dealt[self.shard.rank][index])

    def update(self, consumed: int) -> list[Batch]:
        """Return all of the shard's microbatches of the update that starts at position `consumed`."""
        samples, dealt = self.dealt(consumed)
        return [self._batch(samples, microbatch) for microbatch in dealt[self.shard.rank]]

    def dealt(self, consumed: int) -> tuple[list[tuple[int, int]], list[list[Dealt]]]:
        """Return (sample, epoch) of a whole update as they come, and who reads which: [shard][microbatch]."""
        samples = self.columns.samples_at(self.seed, range(consumed, consumed + self.update_samples))
        shards, places = self.shard.size, list(range(len(samples)))
        if self.deal == "length":
            sides = [self.main, *(reading.side for reading in self.sides.values())]
            tokens = self.columns.lengths([sample for sample, _ in samples], sides)
            if self.tokens is not None:
                return samples, self._cut(tokens, self.tokens)
            places = by_length(tokens)
        cut = [
            Dealt(places=tuple(places[first : first + self.samples]))
            for first in range(0, len(places), self.samples)
        ]
        return samples, [cut[shard::shards] for shard in range(shards)]

    def _cut(self, tokens: NDArray[numpy.int64], budget: int) -> list[list[Dealt]]:
        """Cut an update, [samples, models] tokens, by a budget of positions."""
        if not self.pack:
            return cut_by_budget(tokens, self.rungs, budget, self.shard.size)
        block_sizes = [self.block_size, *(side.block_size for side in self.sides.values())]
        return cut_into_packs(tokens, self.rungs, block_sizes, budget, self.shard.size)

    def _batch(self, samples: Sequence[tuple[int, int]], dealt: Dealt) -> Batch:
        mine = [samples[place] for place in dealt.places]
        return self.batch_of([sample for sample, _ in mine], [epoch for _, epoch in mine], dealt.lengths)

    def batch_of(
        self,
        rows: Sequence[int],
        epochs: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Batch:
        """Return the given samples, in the given order, padded to a common length.

        Args:
            rows: sample numbers; what evaluation asks for.
            epochs: of each sample; default 0.
            lengths: what the tokens in the student's place, and those of each side, are padded to; None: the
                fixed length, or the longest of these samples.

        Raises:
            DataError: a token id that a model which reads it does not know.
        """
        read = [self.columns.row(row) for row in rows]
        padded = [self.fixed_length, *(None for _ in self.sides)] if lengths is None else list(lengths)
        own, *others = padded
        ids, labels = self._pad(read, self.main, self.block_size, own)
        self._check_known(ids, rows, self.known)
        return Batch(
            sample_ids=torch.tensor(rows, dtype=torch.int64),
            epochs=torch.tensor(epochs or [0] * len(rows), dtype=torch.int64),
            ids=ids,
            labels=labels,
            reply_bytes=torch.tensor([int(row["reply_bytes"][0]) for row in read], dtype=torch.int64),
            sides={
                name: self._side(read, rows, reading, length)
                for (name, reading), length in zip(self.sides.items(), others, strict=True)
            },
            taught=self._who_teaches(rows),
        )

    def _who_teaches(self, rows: Sequence[int]) -> dict[str, tuple[bool, ...]]:
        """Return whether each teacher that teaches some sources only teaches these samples."""
        if not self.taught:
            return {}
        names, numbers = self.columns.sources_of(numpy.array(rows, dtype=numpy.int64))
        sources = [names[number] for number in numbers]
        return {name: tuple(source in wanted for source in sources) for name, wanted in self.taught.items()}

    def of_teacher(self, teacher: str, block_size: int) -> Loader:
        """Return a loader of the tokens that one teacher reads, as if they were the student's.

        Args:
            teacher: its name; one without a side reads the student's tokens.
            block_size: the teacher's; 1 for a bidirectional one.
        """
        reading = self.sides.get(teacher)
        if reading is None:
            return dataclasses.replace(self, sides={}, taught={}, block_size=block_size)
        return dataclasses.replace(
            self,
            sides={},
            taught={},
            main=reading.side,
            block_size=reading.block_size,
            fixed_length=None,
            known=reading.known,
        )

    def _pad(
        self, read: Sequence[Row], side: str | None, block_size: int, fixed_length: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return ids and labels of the student's tokens or of a side's, ([samples, length], the same).

        The last block of a sample that was cut is filled with pads: end tokens would teach that the text ends
        where the window did.
        """
        tokenizer, prefix = self.columns.tokenizer_of(side), f"{side}." if side else ""
        examples = []
        for row in read:
            ids = row[f"{prefix}ids"].tolist()
            labels = labels_of(ids, row[f"{prefix}replies"].tolist(), IGNORED)
            if row[f"{prefix}{CUT_COLUMN}"][0]:
                filled = -(-len(ids) // block_size) * block_size
                examples.append(pad_to_length(ids, labels, filled, tokenizer.pad_id))
            else:
                examples.append(pad_to_blocks(ids, labels, block_size, tokenizer.eos_id))
        length = fixed_length or max(len(ids) for ids, _ in examples)
        padded = [pad_to_length(ids, labels, length, tokenizer.pad_id) for ids, labels in examples]
        return torch.tensor([ids for ids, _ in padded]), torch.tensor([labels for _, labels in padded])

    def _check_known(self, ids: Tensor, rows: Sequence[int], known: Readers | None) -> None:
        """Refuse ids [samples, length] that a reader does not know; all of it is on the host."""
        if known is None:
            return
        limit, reader = known
        outside = ((ids < 0) | (ids >= limit)).nonzero()
        if len(outside):
            sample, place = outside[0].tolist()
            raise DataError(
                f"{self.columns.where(rows[sample])} has the token id {int(ids[sample, place])}, "
                f"but {reader} knows the ids 0 to {limit - 1}; prepare the data again with its tokenizer"
            )

    def _side(
        self, read: Sequence[Row], rows: Sequence[int], reading: SideReading, length: int | None
    ) -> TeacherTokens:
        """Return the same samples in a teacher's tokens, with their chunks."""
        ids, _ = self._pad(read, reading.side, reading.block_size, length)
        self._check_known(ids, rows, reading.known)
        spans = [torch.from_numpy(row[f"{reading.side}.chunks"]).long().view(-1, 4) for row in read]
        sizes = [len(row[f"{reading.side}.ids"]) for row in read]
        cut = [row[f"{reading.side}.{CUT_COLUMN}"][0] for row in read]
        blocks = [1 if is_cut else reading.block_size for is_cut in cut]
        return TeacherTokens(
            ids=ids,
            lengths=torch.tensor(
                [-(-size // block) * block for size, block in zip(sizes, blocks, strict=True)]
            ),
            spans=torch.cat(spans),
            sample=torch.repeat_interleave(torch.tensor([len(span) for span in spans])),
            number=torch.cat([torch.arange(len(span)) for span in spans]),
        )
