"""How long a rank may show nothing new in each phase of a step before it is taken for one that stands still.

One number serves every run: `hang_seconds`, which some phases may exceed. Who knows a cluster knows better:
its data never take long, its disk takes a quarter of an hour for a checkpoint. So each phase may have a
deadline of its own. Who looks at the clock is `launch.watchdog`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.options import STRICT

SLOW_FACTOR = 4.0
"""So many times `hang_seconds` may a save, an evaluation and the time between phases take that have no
deadline; and the first update so many times what a later one may, for it compiles."""
_SLOW, _COMPILES_NOTHING = ("evaluate", "checkpoint", ""), ("data", "evaluate", "checkpoint")
_ALONE = ("data",)
"""Phases in which no rank waits for another."""
Seconds = Annotated[float | None, Field(ge=1.0, le=604_800.0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Deadlines:
    """How many seconds a rank may show nothing new in a phase, in place of `hang_seconds`; null: that.

    A rank that waits for another one stands in its own phase meanwhile, so a phase in which ranks wait must
    be given as long as they may come apart. One that is not given may take as long as the longest of a step.
    """

    data: Seconds = None
    """Reading the next update's samples."""
    teacher: Seconds = None
    """A teacher's forward pass."""
    exchange: Seconds = None
    """Sending the teachers' hidden rows to the ranks of the vocabulary."""
    student: Seconds = None
    """The student's forward pass."""
    head: Seconds = None
    """Vocabulary heads and losses."""
    backward: Seconds = None
    """The student's backward pass, its gradient's sums over ranks among it."""
    optimizer: Seconds = None
    """The optimizer's update, with the gradient norm that all ranks agree on."""
    evaluate: Seconds = None
    """One microbatch of an evaluation, at all noise levels; null: four times `hang_seconds`."""
    checkpoint: Seconds = None
    """What training waits for of a save; null: four times `hang_seconds`."""

    def limit(self, phase: str, hang_seconds: float, *, is_first_update: bool) -> tuple[float, str]:
        """Return how many seconds a rank may show nothing new, and the recipe's key that says so, in words.

        Args:
            phase: one of `base.phases.PHASES`; empty: the time between two.
            hang_seconds: what holds where nothing is given.
            is_first_update: it compiles; reading data, evaluating and saving do not.
        """
        given = getattr(self, phase, None)
        if given is not None:
            return _told(
                given, f"deadlines.{phase}", is_slow=is_first_update and phase not in _COMPILES_NOTHING
            )
        if phase in _SLOW:
            return _told(hang_seconds, "hang_seconds", is_slow=True)
        longest = {name: value for name, value in self._given().items() if name not in _SLOW}
        name = max(longest, key=longest.__getitem__, default="")
        if name and longest[name] > hang_seconds:
            return _told(longest[name], f"deadlines.{name}", is_slow=is_first_update)
        return _told(hang_seconds, "hang_seconds", is_slow=is_first_update)

    def shortest_wait(self, hang_seconds: float) -> float:
        """Return the seconds after which ranks that wait for a lost one are first taken for the cause."""
        given = [value for name, value in self._given().items() if name not in _ALONE]
        return min([hang_seconds, *given])

    def _given(self) -> dict[str, float]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def _told(seconds: float, key: str, *, is_slow: bool) -> tuple[float, str]:
    """Return a limit, and where it comes from in words."""
    return (SLOW_FACTOR * seconds, f"{SLOW_FACTOR:g} x {key}") if is_slow else (seconds, key)


NO_DEADLINES = Deadlines()
"""`hang_seconds` alone."""
