"""A blend: several prepared data sets read as one, each with its share of the samples.

Shares are kept exactly: of the first m samples of a run, whatever m is at a block's edge, a source has given
its share of m to within one sample, and within a block of some hundreds the sources are shuffled. Which
sample a position reads is a function of (seed, position), as in a single data set, so a blend has no state,
and any number of ranks reads the same one. A source goes through its own samples epoch by epoch, in an order
that depends on the seed and its name: adding a source leaves the others' orders as they were.

A sample's number counts all samples of the folders before its own, so it is one sample's alone, and with its
source's epoch it keys the noise.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

import numpy
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.base.options import PLACE, STRICT, Folder
from tide_megatron.data.columns import CUT_COLUMN, SIDE_COLUMNS
from tide_megatron.data.dataset import PreparedData, Row
from tide_megatron.data.manifest import SideMetadata, TokenizerMetadata
from tide_megatron.data.order import order_of_epoch, samples_at

LEAST_BLOCK = 256
"""Samples within which sources are shuffled; more where a source has so small a share that it would get
none."""
MOST_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BlendSource:
    """A prepared data folder, or a part of one, and how much of a run is read from it."""

    folder: Annotated[Folder, PLACE]
    """What `tide prepare` wrote."""
    source: str | None = None
    """Only the samples of this source of the folder; null: all."""
    weight: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Its part of the samples, in proportion to the other sources' weights; give it to all or to none."""
    epochs: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """In place of a weight: how often it is read while the others are read as often as they say; null: 1."""
    samples: int | None = Field(default=None, ge=1)
    """Read no more than so many of its samples, drawn once; null: all."""
    most_epochs: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Refuse a run that would read any of them more often; null: it may."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A source of a blend, opened."""

    data: PreparedData
    options: BlendSource
    first: int
    """Number of its folder's first sample in the blend."""
    rows: NDArray[numpy.int64] | None
    """Which samples of its folder it has; None: all."""

    def __len__(self) -> int:
        """Return how many samples it has."""
        return len(self.data) if self.rows is None else len(self.rows)

    def samples(self, indices: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
        """Return the numbers, in the blend, of some of its samples."""
        return self.first + (indices if self.rows is None else self.rows[indices])


class BlendedData:
    """Several prepared data sets, read as one; has what `PreparedData` has for a `Loader`.

    Raises:
        ConfigError: shares that cannot be, or data that does not fit together; names the source.
    """

    def __init__(self, opened: Mapping[str, tuple[BlendSource, PreparedData]], seed: int) -> None:
        """Take opened folders.

        Args:
            opened: by the sources' names; folders of one tokenizer and template.
            seed: of the run: it draws the samples where a source has only some of its folder's.
        """
        self.members: dict[str, Member] = {}
        first = 0
        for name, (options, data) in opened.items():
            rows = _rows_of(name, options, data, seed)
            self.members[name] = Member(data=data, options=options, first=first, rows=rows)
            first += len(data)
        self._firsts = [member.first for member in self.members.values()]
        self._by_number = list(self.members.values())
        shares = _shares(self.members)
        self.ends = [Fraction(0), *itertools.accumulate(shares)]
        """Shares of all sources up to each; exact."""
        self.block = max(LEAST_BLOCK, math.ceil(1 / min(shares)))
        if self.block > MOST_BLOCK:
            name, share = min(zip(self.members, shares, strict=True), key=lambda pair: pair[1])
            raise ConfigError(
                f"{name}: its share of the samples, {float(share):.2g}, is too small to be kept; leave it "
                f"out, or give it one in {MOST_BLOCK} or more"
            )

    def __len__(self) -> int:
        """Return how many samples its sources have together."""
        return sum(map(len, self.members.values()))

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the blend of {', '.join(self.members)}"

    @functools.cached_property
    def digest(self) -> str:
        """Name of what is in it, by content."""
        parts = [
            [name, member.data.digest, *(getattr(member.options, key) for key in ("source", "samples"))]
            for name, member in self.members.items()
        ]
        return hashlib.sha256(repr([parts, list(map(str, self.ends))]).encode()).hexdigest()

    def where(self, sample: int) -> str:
        """Say in which folder a sample is, and which one of it."""
        member = self._member(sample)
        return member.data.where(sample - member.first)

    def row(self, sample: int) -> Row:
        """Return one sample's values in every column that all sources have.

        A source that has no tokens of a side has a single pad there, and no chunk: nobody may ask for them.

        Raises:
            DataError: they do not belong together.
        """
        member = self._member(sample)
        row = member.data.row(sample - member.first)
        found = {name: values for name, values in row.items() if "." not in name}
        for side, own in self._names[self._number(sample)].items():
            for part in SIDE_COLUMNS:
                found[f"{side}.{part}"] = row[f"{own}.{part}"] if own else self._nothing(side)[part]
        return found

    def _nothing(self, side: str) -> Row:
        """Return what stands for the tokens that a source does not have."""
        values = {
            "ids": [self.sides[side].tokenizer.pad_id],
            "replies": [1, 1],
            CUT_COLUMN: [1],
            "chunks": [],
        }
        return {part: numpy.array(numbers, dtype=numpy.int32) for part, numbers in values.items()}

    def lengths(self, samples: Sequence[int], sides: Sequence[str | None]) -> NDArray[numpy.int64]:
        """Return how many tokens samples have, [samples, sides]; see `PreparedData.lengths`."""
        found = numpy.ones((len(samples), len(sides)), dtype=numpy.int64)
        places: dict[int, list[int]] = collections.defaultdict(list)
        for place, sample in enumerate(samples):
            places[self._number(sample)].append(place)
        for number, own in places.items():
            member, names = self._by_number[number], self._names[number]
            rows = [samples[place] - member.first for place in own]
            theirs = [side and names[side] for side in sides]
            held = [at for at, side in enumerate(sides) if side is None or theirs[at]]
            found[numpy.ix_(own, held)] = member.data.lengths(rows, [theirs[at] for at in held])
        return found

    def spread(self, most: int, side: str | None = None) -> NDArray[numpy.int64]:
        """Return about `most` samples, evenly from all sources that have a side; all, if they are no more."""
        sources = zip(self._by_number, self._names, strict=True)
        having = [member for member, names in sources if not side or names[side]]
        step = -(-sum(map(len, having)) // most)
        return numpy.concatenate([member.samples(numpy.arange(0, len(member), step)) for member in having])

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of its sources."""
        return tuple(self.members)

    def sources_of(self, samples: NDArray[numpy.int64]) -> tuple[tuple[str, ...], NDArray[numpy.int64]]:
        """Return the sources' names, and the number of each sample's own in them."""
        return self.source_names, numpy.searchsorted(self._firsts, samples, side="right") - 1

    def longest(self, side: str | None) -> int:
        """Return the most tokens of a sample, of a side or (None) the student's."""
        if side is None:
            return max(member.data.longest(None) for member in self._by_number)
        sources = zip(self._by_number, self._names, strict=True)
        return max(member.data.longest(names[side]) for member, names in sources if names[side] is not None)

    def tokenizer_of(self, side: str | None) -> TokenizerMetadata:
        """Describe the tokenizer of a side, or (None) the student's."""
        return self.sides[side].tokenizer if side else self._by_number[0].data.tokenizer_of(None)

    @functools.cached_property
    def sides(self) -> Mapping[str, SideMetadata]:
        """Sides by the name that the first source which has them gives them; not all need to have all."""
        found: dict[str, SideMetadata] = {}
        for member in self._by_number:
            for name, side in member.data.sides.items():
                if all(side.tokenizer.digest != other.tokenizer.digest for other in found.values()):
                    found[next(word for word in (name, f"{name}#{len(found)}") if word not in found)] = side
        return found

    def side_of(self, tokenizer_digest: str) -> str | None:
        """Return the side of this tokenizer and template, if some source has it."""
        found = (name for name, side in self.sides.items() if side.tokenizer.digest == tokenizer_digest)
        return next(found, None)

    def without(self, side: str) -> list[str]:
        """Return the sources that have no tokens of a side."""
        return [name for name, names in zip(self.members, self._names, strict=True) if not names[side]]

    def samples_at(self, seed: int, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Return (sample, epoch of its source) at positions of a run."""
        wanted: dict[str, list[int]] = collections.defaultdict(list)
        names, order = list(self.members), []
        blocks = {block: self._read(seed, block) for block in {at // self.block for at in positions}}
        for position in positions:
            number, place = blocks[position // self.block][position % self.block]
            wanted[names[number]].append(place)
            order.append(names[number])
        found = {}
        for name, places in wanted.items():
            member = self.members[name]
            read = samples_at(_own_seed(seed, name), places, len(member))
            samples = member.samples(numpy.array([index for index, _ in read])).tolist()
            found[name] = zip(samples, (epoch for _, epoch in read), strict=True)
        return [next(found[name]) for name in order]

    def given(self, positions: int) -> dict[str, int]:
        """Return how many samples each source has given where a run stands, to within a block."""
        return dict(zip(self.members, self._counts(positions), strict=True))

    def epochs(self, positions: int) -> dict[str, float]:
        """Return how often each source was read where a run stands."""
        return {name: given / len(self.members[name]) for name, given in self.given(positions).items()}

    def epoch_samples(self) -> int | None:
        """Return how many samples a run has that reads every source as often as it says.

        None: they have weights, which do not say how long that is.
        """
        if any(member.options.weight for member in self.members.values()):
            return None
        return round(sum(len(member) * (member.options.epochs or 1) for member in self.members.values()))

    def check_epochs(self, positions: int) -> None:
        """Refuse a run of so many samples that reads a source more often than it may.

        Raises:
            ConfigError: names the source, how often it would be read, and what to do.
        """
        for (name, member), share in zip(self.members.items(), self._shares, strict=True):
            most, epochs = member.options.most_epochs, float(share * positions / len(member))
            if most is not None and epochs > most * (1 + 1e-9):
                allowed = int(most * len(member) / share)
                raise ConfigError(
                    f"{name}.most_epochs: the run reads {positions} samples, {float(share):.1%} of them "
                    f"from here, its {len(member)} samples {epochs:.3g} times, more than {most:g}: give it "
                    f"less weight, or read no more than {allowed} samples"
                )

    @property
    def _shares(self) -> list[Fraction]:
        return [after - before for before, after in itertools.pairwise(self.ends)]

    def _counts(self, positions: int) -> list[int]:
        """Return how many of the first samples each source gives; they add up, each to within one."""
        behind = [math.floor(positions * end) for end in self.ends]
        return [after - before for before, after in itertools.pairwise(behind)]

    def _read(self, seed: int, block: int) -> list[tuple[int, int]]:
        """Return (number of the source, how many samples it gave before) at every position of a block."""
        before, behind = (tuple(self._counts(at * self.block)) for at in (block, block + 1))
        return _block(seed, block, before, behind)

    def _member(self, sample: int) -> Member:
        return self._by_number[self._number(sample)]

    def _number(self, sample: int) -> int:
        """Return the number of the source that has a sample."""
        return bisect.bisect_right(self._firsts, sample) - 1

    @functools.cached_property
    def _names(self) -> list[dict[str, str | None]]:
        """What each source's folder calls the blend's sides; None: it does not have them."""
        digests = {name: side.tokenizer.digest for name, side in self.sides.items()}
        return [
            {name: member.data.side_of(digest) for name, digest in digests.items()}
            for member in self._by_number
        ]


@functools.lru_cache(maxsize=4)
def _block(seed: int, block: int, before: tuple[int, ...], behind: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (number of the source, how many samples it gave before) at every position of a block.

    Args:
        seed: of the run.
        block: its number.
        before: how many samples each source has given where it begins.
        behind: and where it ends.
    """
    counts = [last - first for first, last in zip(before, behind, strict=True)]
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    given = list(before)
    found = []
    for place in order_of_epoch(_own_seed(seed, "blend"), block, len(numbers)):
        number = numbers[place]
        found.append((number, given[number]))
        given[number] += 1
    return found


def _own_seed(seed: int, name: str) -> int:
    """Return a seed of a source's own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")


def _rows_of(name: str, options: BlendSource, data: PreparedData, seed: int) -> NDArray[numpy.int64] | None:
    """Return which samples of a folder a source has, ascending; None: all.

    Raises:
        ConfigError: the folder has no such source.
    """
    rows: NDArray[Any] | None = None
    if options.source is not None:
        names, numbers = data.sources_of(numpy.arange(len(data)))
        if options.source not in names:
            raise ConfigError(
                f"{name}.source: {data.folder} has no source {options.source!r}; "
                f"{nearest(options.source, names)}"
            )
        rows = numpy.flatnonzero(numbers == names.index(options.source))
    held = len(data) if rows is None else len(rows)
    if options.samples is not None and options.samples < held:
        drawn = samples_at(_own_seed(seed, f"samples of {name}"), range(options.samples), held)
        chosen = numpy.sort(numpy.array([index for index, _ in drawn]))
        rows = chosen if rows is None else rows[chosen]
    return rows


def _shares(members: Mapping[str, Member]) -> list[Fraction]:
    """Return the share of the samples that each source gives; they add up to 1.

    Raises:
        ConfigError: some have weights and others none, or one has both.
    """
    weighted = [name for name, member in members.items() if member.options.weight is not None]
    for name, member in members.items():
        if weighted and member.options.weight is None:
            raise ConfigError(f"{name}.weight: {weighted[0]} has one: give one to every source, or to none")
        if weighted and member.options.epochs is not None:
            raise ConfigError(f"{name}: has both weight and epochs: give one of the two")
    parts = [
        Fraction(str(member.options.weight))
        if weighted
        else Fraction(str(member.options.epochs or 1.0)) * len(member)
        for member in members.values()
    ]
    return [part / sum(parts) for part in parts]
