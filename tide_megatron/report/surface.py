"""Lambda of a mixture over a run's progress and the noise level, and how far training has come on it."""

from __future__ import annotations

import numpy
import torch

from tide_megatron.base.clock import Clock
from tide_megatron.losses.tidal import Mixture
from tide_megatron.report.figure import INK, Panel, drawing, new_figure
from tide_megatron.report.reading import ReportedRun

POINTS = 41
"""Of the surface, on each axis."""
LEVELS = numpy.linspace(0, 1, 11)


def surfaces(run: ReportedRun, prefix: str) -> list[Panel]:
    """Draw the surface of every mixture of a run."""
    if run.recipe is None:
        return []
    found = []
    for name, loss in run.recipe.terms.items():
        if isinstance(loss, Mixture):
            found.append(_surface(run, f"{prefix}lambda-{name}", name, loss, run.recipe.steps))
    return found


def _surface(run: ReportedRun, key: str, name: str, loss: Mixture, steps: int) -> Panel:
    """Draw one surface; what training has not reached is faded."""
    progress, times = numpy.linspace(0, 1, POINTS), torch.linspace(0, 1, POINTS)
    shares = numpy.stack(
        [
            loss.teacher_share(times, Clock(step=round(share * 10**6), total_steps=10**6)).numpy()
            for share in progress
        ],
        axis=1,
    )  # [times, progress]
    loss_course = run.train.get("loss")
    reached = 0.0 if loss_course is None else min(1.0, loss_course.steps.max() / steps)
    with drawing():
        figure, axes = new_figure()
        axes.grid(visible=False)
        filled = axes.contourf(progress, times.numpy(), shares, levels=LEVELS, cmap="viridis")
        if reached < 1:
            axes.axvspan(reached, 1, facecolor="white", alpha=0.55, edgecolor=INK, hatch="///", linewidth=0)
        axes.axvline(reached, color="#d55e00", linewidth=2.2)
        axes.set_xlabel("progress (updates applied over all)")
        axes.set_ylabel("noise level t")
        figure.colorbar(filled, ax=axes, label="lambda, the teacher's share")
    where = (
        "The whole run is done"
        if reached >= 1
        else f"{reached:.0%} of the run is done (line); the rest is hatched"
    )
    return Panel(
        key=key, title=f"lambda of {name} ({loss.axes}, {loss.growth})", figure=figure, note=f"{where}."
    )
