"""A run as `tide status` tells it: its folder, and what SLURM says of the jobs that were submitted for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.units import in_time
from tide_megatron.launch.squeue import ask
from tide_megatron.train.status import RunStatus, read_status

JOBS, JOB_IDS = "jobs", "job_ids"
"""Each submission has a folder of its own in the run's; what sbatch answered stands there, a job a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobState:
    """A job that was submitted for a run."""

    number: str
    state: str
    """SLURM's word, such as PENDING; empty: squeue does not know it any more, or is not here."""
    reason: str = ""
    """Why it waits."""
    starts_at: str = ""
    """When it began, or is expected to."""
    nodes: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """A run, and its jobs that have not ended."""

    folder: str
    run: RunStatus | None
    """None: nothing has started there yet."""
    jobs: Sequence[JobState] = ()

    def values(self) -> dict[str, Any]:
        """Return it for JSON."""
        run = {"folder": self.folder, "state": self.state} if self.run is None else self.run.values()
        return {**run, "state": self.state, "jobs": [dataclasses.asdict(job) for job in self.jobs]}

    @property
    def state(self) -> str:
        """Say what it does: the run's own word, or that it waits in the queue."""
        is_over = self.run is None or self.run.state != "training"
        if is_over and any(job.state in ("PENDING", "REQUEUED", "CONFIGURING") for job in self.jobs):
            return "queued" if self.run is None or not self.run.starts else f"{self.run.state}, queued again"
        return "not started" if self.run is None else self.run.state


def look(folder: Path) -> Look:
    """Look at a run.

    Raises:
        CheckpointError: the folder is no run's, and nothing was submitted for it.
    """
    jobs = tuple(_jobs(folder))
    try:
        run = read_status(folder)
    except CheckpointError:
        if not jobs:
            raise
        run = None
    return Look(folder=str(folder), run=run, jobs=[job for job in jobs if job.state])


def _jobs(folder: Path) -> Iterator[JobState]:
    """Yield the jobs that were submitted for a run, as squeue sees them now."""
    numbers = [
        line.partition(";")[0]
        for file in sorted((folder / JOBS).glob(f"*/{JOB_IDS}"))
        for line in file.read_text(encoding="utf-8").split()
    ]
    for number in numbers:  # one by one: of several squeue would refuse all when it has forgotten one
        _, *fields = (ask(number, "%A|%T|%r|%S|%N") or "").partition("\n")[0].split("|")
        state = dict(zip(_FIELDS, fields, strict=True)) if len(fields) == len(_FIELDS) else {"state": ""}
        yield JobState(number=number, **state)


_FIELDS = ("state", "reason", "starts_at", "nodes")


def follow(folders: Sequence[Path], every: float | None) -> None:
    """Print runs once, or again every so many seconds until the process is stopped.

    Raises:
        CheckpointError: one is no run's.
    """
    if every is None:
        rich.print(_shown(folders))
        return
    with Live(_shown(folders), console=rich.get_console(), auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(_shown(folders), refresh=True)


def _shown(folders: Sequence[Path]) -> RenderableType:
    return Group(*(Text.from_markup(line) for folder in folders for line in lines_of(look(folder))))


def lines_of(seen: Look) -> list[str]:
    """Say a run in a few lines of rich's markup."""
    run = seen.run
    color = "green" if seen.state in ("training", "finished") else "yellow"
    why = f" ({escape(run.why)})" if run and run.why else ""
    lines = [f"[bold]{escape(seen.folder)}[/]: [{color}]{seen.state}[/]{why}"]
    if run is not None:
        lines += _run_lines(run)
    for job in seen.jobs:
        parts = [job.state.lower()]
        parts += [f"waits for {job.reason}"] if job.state == "PENDING" and job.reason else []
        parts += [f"on {job.nodes}"] if job.nodes else []
        parts += [f"since or from {job.starts_at}"] if job.starts_at not in ("", "N/A") else []
        lines.append(f"  job {escape(job.number)}: {escape(', '.join(parts))}")
    return lines


def _run_lines(run: RunStatus) -> Iterator[str]:
    told = run.told
    if told is not None:
        left = f", {in_time(told.eta_seconds)} to go" if told.eta_seconds and run.state == "training" else ""
        yield f"  step {told.step} of {told.steps}{left}; said {in_time(run.silent_seconds)} ago"
        named = ("loss", "grad_norm", "tokens_per_second", "mfu")
        facts = [f"{name} {value:.4g}" for name in named if (value := told.train.get(name)) is not None]
        if (score := told.scores.get("nll_per_byte")) is not None:
            facts.append(f"held out {score:.4f} nats a byte at step {told.scores['step']:.0f}")
        yield f"  {', '.join(facts)}" if facts else "  nothing measured yet"
    if run.checkpoint:
        yield f"  newest checkpoint {run.checkpoint}, {in_time(run.checkpoint_seconds)} old"
    if run.holder:
        yield f"  held by {escape(run.holder)}"
    for number, start in enumerate(run.starts[-3:], start=max(1, len(run.starts) - 2)):
        lost = f", {start.lost} steps lost" if start.lost else ""
        where = f" on {start.host}" if start.host else ""
        ended = f"; {start.end} {start.ended_at} {escape(start.why)}".rstrip() if start.end else ""
        yield f"  start {number}: {start.at}{escape(where)}, from step {start.step}{lost}{ended}"
    if run.starts and run.starts[-1].startup:
        took, parts = run.starts[-1].startup_seconds, run.starts[-1].startup.items()
        longest = sorted(parts, key=lambda part: -part[1][0])[:4]
        told_parts = ", ".join(f"{name} {seconds:.1f} s" for name, (seconds, _) in longest)
        yield f"  its first update ended {in_time(took)} after the command began: {escape(told_parts)}"
