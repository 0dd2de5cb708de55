"""`make gpu-bench`: what it measures, in the order of its value, and the goals. Standard library only.

Each check is a process of its own with a time limit of its own (`gpu_check.runner`), so a goal is judged from
the rows of several: where one of them is missing it is not measured, and the row says which and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_check.checks import Check
from gpu_check.rows import Row


def _bench(name: str, function: str, *arguments: Any, seconds: float) -> Check:
    return Check(
        name=name, function=f"bench.{function}", arguments=arguments, part="bench", limit_seconds=seconds
    )


BENCHES = (
    _bench("shared ours", "gpu_ways:check_way", "shared", "ours", seconds=110),
    _bench("shared reference", "gpu_ways:check_way", "shared", "reference", seconds=80),
    _bench("cross ours", "gpu_ways:check_way", "cross", "ours", seconds=100),
    _bench("cross reference", "gpu_ways:check_way", "cross", "reference", seconds=100),
    _bench("mixture layer", "gpu_layers:check_mixture", seconds=50),
    _bench("linears", "gpu_layers:check_linears", seconds=40),
    _bench("head", "gpu_layers:check_head", seconds=70),
    _bench("dense forward", "gpu_layers:check_forward", "shared", seconds=60),
    _bench("mixture forward", "gpu_layers:check_forward", "cross", seconds=90),
)
Figures = Mapping[str, Mapping[str, Any]]
"""Check -> what its row measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure that is wished for."""

    name: str
    needs: tuple[str, ...]
    """Checks whose rows it is made of."""
    value: Callable[[Figures], float | None]
    """None: it cannot be known here."""
    limit: float
    is_most: bool = False
    """Whether the figure may be at most the limit; else at least."""
    agreement: float | None = None
    """How far the first objectives of the two checks may be apart; None: there are none."""

    def wish(self) -> str:
        """Write the limit."""
        return f"goal {'<=' if self.is_most else '>='} {self.limit:g}"

    def is_reached(self, value: float) -> bool:
        """Say whether a figure is as wished."""
        return value <= self.limit if self.is_most else value >= self.limit


def _ratio(check: str, other: str, figure: str = "tokens_per_second") -> Callable[[Figures], float]:
    return lambda figures: figures[check][figure] / figures[other][figure]


def _figure(check: str, name: str) -> Callable[[Figures], float | None]:
    return lambda figures: figures[check].get(name)


GOALS = (
    Goal(
        name="whole step, shared, over the reference's way",
        needs=("shared ours", "shared reference"),
        value=_ratio("shared ours", "shared reference"),
        limit=2.5,
        agreement=0.01,
    ),
    Goal(
        name="whole step, cross, over the reference's way",
        needs=("cross ours", "cross reference"),
        value=_ratio("cross ours", "cross reference"),
        limit=2.0,
        agreement=0.05,  # FP8 beside bf16
    ),
    Goal(
        name="dense linears, FP8 over bf16",
        needs=("linears",),
        value=_figure("linears", "speedup"),
        limit=1.4,
    ),
    Goal(
        name="mixture layer, grouped over one after the other",
        needs=("mixture layer",),
        value=_figure("mixture layer", "speedup"),
        limit=4.0,
    ),
    Goal(
        name="head over the floor of its products",
        needs=("head",),
        value=_figure("head", "over_floor"),
        limit=1.4,
        is_most=True,
    ),
    Goal(
        name="student's MFU, forward and backward",
        needs=("shared ours",),
        value=_figure("shared ours", "student_mfu"),
        limit=0.25,
    ),
)


def judge(rows: Sequence[Row], *, is_rehearsal: bool) -> list[Row]:
    """Return a row for every goal: reached, missed, or not measured and why.

    Args:
        rows: of the bench's checks.
        is_rehearsal: they were made in small on a CPU, and say nothing about a goal.
    """
    return [_judged(goal, {row.check: row for row in reversed(rows)}, is_rehearsal) for goal in GOALS]


def _judged(goal: Goal, rows: Mapping[str, Row], is_rehearsal: bool) -> Row:
    name = f"goal: {goal.name}"
    lacking = [check for check in goal.needs if check not in rows or rows[check].verdict != "passed"]
    if lacking:
        why = "; ".join(
            f"{check}: {rows[check].text if check in rows else 'was not asked for'}" for check in lacking
        )
        return Row(check=name, verdict="not measured", text=f"{goal.wish()}; {why}")
    figures = {check: rows[check].figures for check in goal.needs}
    if goal.agreement is not None:
        ours, other = (figures[check]["objective"] for check in goal.needs)
        if not abs(ours - other) <= goal.agreement * abs(other):
            return Row(
                check=name, verdict="failed", text=f"both ways' first objectives differ: {ours}, {other}"
            )
    value = goal.value(figures)
    if value is None:
        return Row(check=name, verdict="not measured", text=f"{goal.wish()}; no peak is known of this device")
    text = f"{value:.3g}, {goal.wish()}"
    if is_rehearsal:
        return Row(check=name, verdict="not measured", text=f"a CPU's {text}: it says nothing of a GPU")
    verdict = "passed" if goal.is_reached(value) else "missed"
    return Row(check=name, verdict=verdict, text=text, figures={"value": value, "limit": goal.limit})
