"""What one preparation has counted so far: plain sums, which a commit writes down and parts add up."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from tide_megatron.data.preparation.sample import Sample


@dataclasses.dataclass(kw_only=True)
class Tally:
    """Counts of samples and of records that were left out."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Of the student, as in the manifest's statistics."""
    skipped: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Reason -> [records left out, number of the first]."""
    side_counts: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    longest: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tokens of the longest sample, by side; the student's under the empty name."""

    @classmethod
    def of(cls, sides: Iterable[str]) -> Tally:
        """Begin to count."""
        return cls(side_counts={side: collections.Counter() for side in sides})

    def values(self) -> dict[str, Any]:
        """Return it as plain values."""
        sides = {name: dict(found) for name, found in self.side_counts.items()}
        return {**vars(self), "counts": dict(self.counts), "side_counts": sides}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Tally:
        """Return what `values` returned."""
        sides = {name: collections.Counter(found) for name, found in content["side_counts"].items()}
        return cls(**{**content, "counts": collections.Counter(content["counts"]), "side_counts": sides})

    def add(self, sample: Sample) -> None:
        """Count a sample."""
        self._add_up(sample)

    def skip(self, reason: str, record: int) -> None:
        """Count a record that is left out."""
        self.skipped.setdefault(reason, [0, record])[0] += 1

    def skipped_counts(self) -> dict[str, int]:
        """Return reason -> records, in the order in which the reasons were met."""
        return by_first(self.skipped)

    def merge(self, other: Tally) -> None:
        """Add what another part of the same records has counted."""
        self._add_up(other)
        merge_firsts(self.skipped, other.skipped)

    def _add_up(self, found: Sample | Tally) -> None:
        """Add counts of samples."""
        self.counts.update(found.counts)
        for name, tokens in found.longest.items():
            self.longest[name] = max(tokens, self.longest.get(name, 0))
        for name, counts in found.side_counts.items():
            self.side_counts[name].update(counts)


def by_first(found: Mapping[str, list[int]]) -> dict[str, int]:
    """Return key -> number of [number, first record], in the order of the first records."""
    ordered = sorted(found, key=lambda key: found[key][1])
    return {key: found[key][0] for key in ordered}


def merge_firsts(found: dict[str, list[int]], more: Mapping[str, list[int]]) -> None:
    """Add numbers, and keep the earlier of the first records."""
    for key, (number, first) in more.items():
        there = found.setdefault(key, [0, first])
        there[0], there[1] = there[0] + number, min(there[1], first)
