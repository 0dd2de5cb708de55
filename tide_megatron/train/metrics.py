"""What a run tells while it goes: records to console, JSONL, TensorBoard and wandb.

`Metrics` collects what the loop hands it after every step, and every few steps writes one record to each
sink. Names are flat (`loss`, `loss/kl`, `phase/teacher`), the same in every sink; docs/metrics.md has every
one of them, with its unit. Only rank 0 has sinks; the other ranks call the same methods and nothing happens,
so loops need no `if rank == 0`. The loop's values are already the same on every rank. One collective is made
for each training record: all ranks' seconds by phase come together.

`metrics.jsonl` is the record that plots are made from: one flushed line per record; a resumed run first drops
the lines of steps that were done but not saved, so the file reads as if the run had never stopped.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tide_megatron.base.clock import Clock
from tide_megatron.base.memory import peak_memory_bytes
from tide_megatron.base.phases import PHASES, Phases
from tide_megatron.data.loader import Loader
from tide_megatron.parallel.collectives import gather_objects, gather_vectors
from tide_megatron.tasks.in_training import Answered
from tide_megatron.train.cost import Cost, Devices
from tide_megatron.train.progress import Progress
from tide_megatron.train.recipe import MetricsOptions, Recipe
from tide_megatron.train.sinks import JsonLines, Record, Sink, TensorBoard, WeightsAndBiases, guarded
from tide_megatron.train.slow_ranks import SlowRanks
from tide_megatron.train.status import StatusPage
from tide_megatron.train.step import StepResult

log = logging.getLogger(__name__)

PAUSES = ("evaluate", "checkpoint")
"""Phases that are not training: tokens per second leave them out."""


@dataclasses.dataclass(kw_only=True)
class _Window:
    """What happened since the last record."""

    started_seconds: float
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    peak_memory_bytes: float = 0.0
    averaged: list[Mapping[str, float]] = dataclasses.field(default_factory=list)


class Metrics:
    """Collects the values of every step and reports them; a context manager that closes its sinks."""

    def __init__(
        self,
        options: MetricsOptions,
        folder: Path,
        clock: Clock,
        *,
        phases: Phases,
        devices: Devices,
        recipe: Mapping[str, Any] | None,
    ) -> None:
        """Open the sinks on rank 0, and forget the times before the first step. All ranks call it.

        Args:
            options: where to and how often.
            folder: the run folder.
            clock: where the run starts or goes on; later records of an earlier attempt are dropped.
            phases: the timer that the step uses.
            devices: what the run computes on.
            recipe: the resolved recipe, for wandb, on rank 0; None: this is another rank, without sinks.
        """
        self.options = options
        self.phases = phases
        self.devices = devices
        phases.take()
        phases.take_peaks()
        self._window = _Window(started_seconds=time.monotonic())
        self._progress: Progress | None = None
        self._sinks: list[Sink] = []
        hosts = gather_objects(platform.node())
        if recipe is not None:
            self._progress = Progress(clock)
            self._sinks = [self._progress, JsonLines(folder, clock), SlowRanks(hosts)]
            self._sinks.append(guarded("status.html", lambda: StatusPage(folder, clock, hosts)))
            if options.tensorboard:
                self._sinks.append(guarded("tensorboard", lambda: TensorBoard(folder, clock)))
            if options.wandb != "off":
                mode, project = options.wandb, options.project
                self._sinks.append(guarded("wandb", lambda: WeightsAndBiases(folder, mode, project, recipe)))

    def __enter__(self) -> Metrics:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the sinks, also after an error."""
        self.close()

    def step(
        self,
        clock: Clock,
        *,
        averaged: Mapping[str, float],
        latest: Mapping[str, float],
        tokens: int,
        cost: Cost,
    ) -> None:
        """Take the values of one attempted update. All ranks call it after every step.

        Args:
            clock: after the update.
            averaged: values whose mean since the last record is reported (losses, gradient norm); values that
                are not finite are left out of the mean.
            latest: values reported as they are now (learning rate, lambda).
            tokens: tokens read by all ranks in this step.
            cost: of all ranks.
        """
        window = self._window
        window.steps += 1
        window.tokens += tokens
        window.flops += cost.flops
        window.peak_memory_bytes = cost.peak_memory_bytes
        window.averaged.append(averaged)
        attempts = clock.step + clock.skipped
        if self._progress is not None:
            self._progress.advance(clock)
        if attempts == 1 or attempts % self.options.every == 0 or clock.step == clock.total_steps:
            seconds = max(time.monotonic() - window.started_seconds, 1e-9)
            phases = self.phases.take()
            by_rank = gather_vectors([phases.get(name, 0.0) for name in PHASES]).tolist()
            values = {**means(window.averaged), **latest, **self._costs(seconds, phases)}
            self._write(Record(kind="train", clock=clock, values=values, rank_seconds=by_rank))
            self._window = _Window(started_seconds=time.monotonic())

    def evaluated(self, clock: Clock, values: Mapping[str, float]) -> None:
        """Report held-out scores at once."""
        self._write(Record(kind="evaluate", clock=clock, values=dict(values)))

    def asked(self, clock: Clock, scores: Mapping[str, float], answers: Sequence[Answered]) -> None:
        """Report what the student was asked, at once.

        Args:
            clock: of the moment.
            scores: mean score by task.
            answers: replies for a person to read.
        """
        self._write(Record(kind="tasks", clock=clock, values=dict(scores), answers=answers))

    def close(self) -> None:
        """Flush and close every sink; later calls do nothing."""
        sinks, self._sinks, self._progress = self._sinks, [], None
        for sink in sinks:
            sink.close()

    def _write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def _costs(self, seconds: float, phases: Mapping[str, float]) -> dict[str, float]:
        """Return rates, shares of the time by phase, and the largest memory so far.

        Rates are over the time of training: what `PAUSES` took is left out.

        Args:
            seconds: since the record before.
            phases: seconds of them by phase.
        """
        window = self._window
        training = max(seconds - sum(phases.get(name, 0.0) for name in PAUSES), 1e-9)
        device_seconds, peak = training * self.devices.number, self.devices.peak_flops
        return {
            "seconds": seconds,
            "tokens_per_second": window.tokens / training,
            "tokens_per_second_per_device": window.tokens / device_seconds,
            "seconds_per_step": training / window.steps,
            "tflops_per_device": window.flops / device_seconds / 1e12,
            **({} if peak is None else {"mfu": window.flops / (device_seconds * peak)}),
            # The other ranks' is as of the last step's beginning: no collective is made for it.
            "peak_memory_bytes": max(window.peak_memory_bytes, peak_memory_bytes()),
            **{f"phase/{name}": spent / seconds for name, spent in phases.items()},
            **{f"peak_bytes/{name}": float(held) for name, held in self.phases.take_peaks().items()},
        }


def report_step(
    metrics: Metrics, recipe: Recipe, loader: Loader, result: StepResult, before: Clock, after: Clock
) -> None:
    """Hand one step's values to the metrics. All ranks call it after every step."""
    if not result.update.applied:
        log.warning(
            "step %d was skipped: gradient norm %s, terms %s (%d skipped so far)",
            after.step,
            result.update.grad_norm,
            {name: round(value, 4) for name, value in result.terms.items()},
            after.skipped,
        )
        for name, ids in result.broken.items():
            log.warning(
                "teachers.%s: its answer is not finite for samples %s of data.train", name, _listed(ids)
            )
    metrics.step(
        after,
        averaged={
            "loss": result.objective,
            **{f"loss/{name}": value for name, value in result.terms.items()},
            **{f"items/{name}": value for name, value in result.items.items()},
            "grad_norm": result.update.grad_norm,
            **result.gradients,
            "hidden_share": result.masked / max(1, result.tokens),
            **{f"bytes/{kind}": float(moved) for kind, moved in result.bytes.items() if moved},
        },
        latest={
            "learning_rate": result.update.learning_rate,
            **{
                f"{kind}/{name}": value
                for name, loss in recipe.terms.items()
                for kind, value in loss.metrics(before).items()
            },
            **{f"epochs/{name}": epochs for name, epochs in loader.columns.epochs(after.consumed).items()},
        },
        tokens=result.tokens,
        cost=result.cost,
    )


def _listed(ids: Sequence[int], most: int = 10) -> str:
    """Write sample ids into a log line, the first ones only when there are many."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(map(str, ids[:most])) + more


def means(steps: list[Mapping[str, float]]) -> dict[str, float]:
    """Average each name over the steps that have it; a name without any finite value is NaN."""
    names = {name: None for step in steps for name in step}  # a dict keeps the order
    result = {}
    for name in names:
        finite = [step[name] for step in steps if name in step and math.isfinite(step[name])]
        result[name] = sum(finite) / len(finite) if finite else math.nan
    return result
