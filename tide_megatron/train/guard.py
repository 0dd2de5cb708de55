"""Updates that a run must not build on: losses or gradients out of their band, and when it goes back.

A run that has left its path seldom finds it again by itself, and nobody watches at three in the morning. So
the objective and the gradient norm of every update are held against their medians over the last ones; when
several in a row are out of the band, or were not finite, the run takes up its newest checkpoint from before
them and reads on where it is: the samples that it stumbled over are not read again. That is limited, and the
end says why.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import statistics

from pydantic import Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import TideError
from tide_megatron.base.options import STRICT

log = logging.getLogger(__name__)

LEAST_KNOWN = 20
"""Updates before there is a band: those of the beginning are no measure."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardOptions:
    """When a run goes back to a checkpoint by itself. Decided from numbers that all ranks have alike."""

    band: float | None = Field(default=10.0, gt=1.0)
    """An update is out of its band when objective or gradient norm is above so many times the median of the
    last `window` updates; null: no band."""
    window: int = Field(default=100, ge=LEAST_KNOWN)
    """Updates that the medians are of."""
    patience: int = Field(default=3, ge=1)
    """So many updates in a row out of the band, and the run goes back."""
    not_finite: int = Field(default=10, ge=1)
    """So many updates in a row that are not finite, and it does, too; they are not applied in any case."""
    returns: int = Field(default=3, ge=0)
    """How often, in one start; the next time the run ends. 0: it ends at once."""


class Guard:
    """Watches the updates of a run; the same on every rank."""

    def __init__(self, options: GuardOptions) -> None:
        """Start with nothing known."""
        self.options = options
        self.returns = 0
        """How often the run went back."""
        self._forget()

    def _forget(self) -> None:
        self.reason = ""
        """What is wrong with the last updates; empty: nothing."""
        self.since: int | None = None
        """The last applied update before them."""
        size = self.options.window
        self._known = {name: collections.deque[float](maxlen=size) for name in ("objective", "gradient norm")}
        self._bad = self._not_finite = 0

    def after_step(self, before: Clock, objective: float, grad_norm: float, *, applied: bool) -> bool:
        """Take in an attempted update; say whether the run must go back. Not a collective.

        Args:
            before: the clock it began at.
            objective: of the update; like the others the same on every rank.
            grad_norm: before clipping.
            applied: False: it was not finite, and was skipped.
        """
        values = {"objective": objective, "gradient norm": grad_norm}
        if not applied:
            self._not_finite += 1
            self._mark(before, f"{self._not_finite} updates in a row were not finite")
            return self._not_finite >= self.options.not_finite
        self._not_finite = 0
        out = self._out_of_band(values)
        if out:
            self._bad += 1
            self._mark(before, out)
            log.warning("step %d: %s (%d in a row)", before.step + 1, out, self._bad)
            return self._bad >= self.options.patience
        self._bad, self.since, self.reason = 0, None, ""
        for name, value in values.items():
            self._known[name].append(value)
        return False

    def last_good_step(self, clock: Clock) -> int:
        """Return after how many applied updates nothing was wrong yet."""
        return clock.step if self.since is None else self.since

    def _mark(self, before: Clock, reason: str) -> None:
        self.since, self.reason = before.step if self.since is None else self.since, reason

    def _out_of_band(self, values: dict[str, float]) -> str:
        """Say which value is out of its band; empty: none."""
        for name, value in values.items():
            known = self._known[name]
            if self.options.band is None or len(known) < LEAST_KNOWN:
                continue
            middle = statistics.median(known)
            if middle > 0 and not value <= self.options.band * middle:
                times = value / middle
                return f"the {name}, {value:.4g}, is {times:.3g} times the median of {len(known)} updates"
        return ""

    def returned(self, clock: Clock, to: Clock) -> Clock:
        """Note that the run went back, and say where it stands now.

        Args:
            clock: where it stood.
            to: of the checkpoint that was loaded.

        Returns:
            The checkpoint's step with the samples that were read until now: they are passed over.
        """
        self.returns += 1
        log.warning(
            "step %d: %s; the run goes back to step %d, past the samples read since (%d of %d times)",
            clock.step,
            self.reason,
            to.step,
            self.returns,
            self.options.returns,
        )
        self._forget()
        return dataclasses.replace(clock, step=to.step)

    def farewell(self, clock: Clock) -> TideError:
        """Say why the run ends, and what its user can do."""
        if self.returns:
            tried = f"it went back {self.returns} time(s) and came here again"
        elif self.options.returns:
            tried = "there is no checkpoint from before it (checkpoints.every)"
        else:
            tried = "guard.returns is 0"
        return TideError(
            f"{self.reason} (step {clock.step}), and {tried}; lower optimizer.learning_rate or a loss "
            "weight, or look for a model whose weights are damaged or that answers NaN; the run goes on from "
            "its last checkpoint, if it has one"
        )
