"""What one rank asks of a teacher in a step: its views of every microbatch, and their sizes as plain numbers.

The sizes of all ranks travel in the step's one count collective; afterwards every rank knows how long each
other's parts are, and nothing between here and the head synchronises with the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from tide_megatron.diffusion.views import View


class ViewSize(NamedTuple):
    """The shape of one view."""

    samples: int
    length: int
    """Of one part."""
    rows: int
    """Positions it asks for."""

    @classmethod
    def of(cls, view: View) -> ViewSize:
        """Measure a view."""
        return cls(len(view.ids), view.length, len(view.rows))


Sizes = Sequence[Sequence[ViewSize]]
"""[microbatch][pass]: what one rank asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One rank's views for one teacher."""

    views: Sequence[tuple[View, ...]]
    """[microbatch][pass]."""
    fingerprints: Sequence[int]
    """Of the batches the views were made from, one per microbatch."""

    def numbers(self) -> list[int]:
        """Return all sizes behind each other; as many numbers on every rank."""
        return [number for passes in self.views for view in passes for number in ViewSize.of(view)]

    def sizes(self, numbers: Sequence[int]) -> Sizes:
        """Read what another rank's request of the same form says of itself."""
        fields = len(ViewSize._fields)
        found = [ViewSize(*numbers[start : start + fields]) for start in range(0, len(numbers), fields)]
        passes = len(self.views[0])
        return [found[start : start + passes] for start in range(0, len(found), passes)]


def num_rows(passes: Sequence[ViewSize]) -> int:
    """Return the rows that all passes of one microbatch bring together."""
    return sum(size.rows for size in passes)
