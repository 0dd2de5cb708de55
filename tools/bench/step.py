"""What a whole training step costs, against the plain way, on several ranks, and by part.

    python tools/bench/step.py --json          (both pipelines, V = 151,936, bf16, 1 thread: about 4 minutes)
    python tools/bench/step.py --ranks 2 --json     (1 rank x 8 microbatches against 2 ranks x 4, in turns)
    python tools/bench/step.py --profile            (phases and the ten most expensive operations)

Sizes are told in `step_case`. Plain and ours start from the same weights and make the same updates (SGD,
clipped) on the same microbatch, in turns; figures are medians. `objective_difference` and
`grad_norm_difference` are the largest relative differences over all turns. With `--ranks` every round hides
other tokens, and `tokens_ratio` is the median over rounds of seconds of one rank over seconds of all;
`machine_ratio` is what as many single ranks reach that share nothing but the machine, which bounds it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.cost import machine, median_costs
from bench.plain_step import plain_step
from bench.step_case import CLOCK, TEACHER, Setting, batch_of, given_of, make_run, make_student, own_batches
from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.train.step import train_step

PIPELINES = ("shared", "cross")
MICROBATCHES = 8
"""Of an update, over all ranks."""
LAUNCHES = 2
"""How often one rank and several take turns: each is a launch of its own."""

Work = Callable[[], None]
Figures = tuple[float, float]
"""Objective and gradient norm of one step."""


def make_works(setting: Setting, device: Device) -> tuple[dict[str, Work], dict[str, list[Figures]], Any]:
    """Return both ways' step, where each call notes its figures, and facts about the microbatch."""
    run, student = make_run(setting, device), make_student(setting, device)
    teacher, batch = run.teachers[TEACHER].model, batch_of(setting, 0)
    given = given_of(run, batch)
    figures: dict[str, list[Figures]] = {"plain": [], "ours": []}

    def plain() -> None:
        objective, update = plain_step(student, teacher, given, CLOCK)
        figures["plain"].append((objective, update.grad_norm))

    def ours() -> None:
        result = train_step(run, run.read([batch]), CLOCK)
        assert result.update.applied, "the step was skipped"
        figures["ours"].append((result.objective, result.update.grad_norm))

    facts = {
        "rows": int(given.batch.masked.sum()),
        "positions": 2 * batch.ids.numel(),
        "teacher_positions": 2 * given.teacher_ids.numel() * given.teacher_context.parts,
    }
    return {"plain": plain, "ours": ours}, figures, facts


def measure(settings: list[Setting], rounds: int, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Time both ways in turns on this rank, pipeline by pipeline."""
    torch.set_num_threads(1)
    found = {}
    for setting in settings:
        works, figures, facts = make_works(setting, device)
        costs = median_costs(works, rounds)
        plain, ours = costs["plain"], costs["ours"]
        found[setting.pipeline] = {
            "cpu_ratio": plain.cpu / ours.cpu,
            "wall_ratio": plain.wall / ours.wall,
            "ours_seconds": ours.cpu,
            "plain_seconds": plain.cpu,
            "objective_difference": _difference(figures, 0),
            "grad_norm_difference": _difference(figures, 1),
            "objective": figures["ours"][0][0],
            **facts,
        }
    return found


def _difference(figures: dict[str, list[Figures]], place: int) -> float:
    """Return the largest relative difference of one figure over all turns."""
    pairs = zip(figures["ours"], figures["plain"], strict=True)
    return max(abs(ours[place] - plain[place]) / abs(plain[place]) for ours, plain in pairs)


def measure_seconds(
    setting: Setting, rounds: int, head_ranks: int, *, device: Device, stop: StopFlag
) -> dict[str, Any]:
    """Time whole updates on this world, one thread a rank; every round hides other tokens."""
    torch.set_num_threads(1)
    run = make_run(setting, device, head_ranks)
    found: dict[str, Any] = {"seconds": [], "rows": [], "cpu_seconds": [], "tokens": 0}
    for turn in range(rounds + 1):
        batches = own_batches(setting, MICROBATCHES, turn)
        dist.barrier()
        started, cpu = time.perf_counter(), time.process_time()
        result = train_step(run, run.read(batches), CLOCK)
        cpu = time.process_time() - cpu
        dist.barrier()
        seconds = time.perf_counter() - started
        mine = (sum(int(run.noiser(batch).masked.sum()) for batch in batches), cpu)
        each: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(each, mine)
        if turn:
            found["seconds"].append(seconds)
            found["rows"].append([rows for rows, _ in each])
            found["cpu_seconds"].append([spent for _, spent in each])
        found["tokens"] = result.tokens
    return found | {"phases": run.phases.take()}


def compare_ranks(setting: Setting, rounds: int, ranks: int, head_ranks: int) -> dict[str, Any]:
    """Launch one rank and several in turns; return the ratio of their tokens per second, and why it is so."""
    seconds: dict[int, list[float]] = {1: [], ranks: []}
    last: dict[int, dict[str, Any]] = {}
    apart: list[float] = []
    for _ in range(LAUNCHES):
        apart += _seconds_apart(setting, rounds, ranks)
        for number in seconds:
            args = (setting, rounds, head_ranks if number > 1 else 1)
            last[number] = run_ranks(measure_seconds, args, number, "cpu")
            seconds[number] += last[number]["seconds"]
    assert last[1]["tokens"] == last[ranks]["tokens"], "both read the same text"
    ratios = [alone / together for alone, together in zip(seconds[1], seconds[ranks], strict=True)]
    return {
        "tokens_ratio": statistics.median(ratios),
        "ratios": ratios,
        "machine_ratio": ranks * statistics.median(seconds[1]) / statistics.median(apart),
        "tokens_per_second": {
            str(number): last[number]["tokens"] / statistics.median(found)
            for number, found in seconds.items()
        },
        "seconds": {str(number): found for number, found in seconds.items()},
        "rows_by_rank": last[ranks]["rows"],
        "cpu_seconds_by_rank": last[ranks]["cpu_seconds"],
        "cpu_seconds_alone": last[1]["cpu_seconds"],
        "busiest_rows_over_mean": statistics.median(
            max(rows) / statistics.mean(rows) for rows in last[ranks]["rows"]
        ),
        "phases": {str(number): found["phases"] for number, found in last.items()},
    }


def _seconds_apart(setting: Setting, rounds: int, copies: int) -> list[float]:
    """Time the one rank's updates while as many single ranks run beside each other, which share nothing.

    What they lose against one alone is the machine's: memory and caches that its cores share.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(copies, mp_context=context) as pool:
        args = (measure_seconds, (setting, rounds, 1), 1, "cpu")
        found = [pool.submit(run_ranks, *args) for _ in range(copies)]
        return [second for copy in found for second in copy.result()["seconds"]]


def profile(setting: Setting, rounds: int, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Return seconds of a step by phase, and of its ten most expensive operations, both means over rounds."""
    torch.set_num_threads(1)
    run, batch = make_run(setting, device), batch_of(setting, 0)
    train_step(run, run.read([batch]), CLOCK)
    run.phases.take()
    for _ in range(rounds):
        train_step(run, run.read([batch]), CLOCK)
    phases = {name: spent / rounds for name, spent in run.phases.take().items()}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(rounds):
            train_step(run, run.read([batch]), CLOCK)
    costs = profiler.key_averages(group_by_input_shape=True)
    costs = sorted(costs, key=lambda cost: cost.self_cpu_time_total, reverse=True)[:10]
    operations = [
        {
            "name": cost.key,
            "shapes": str(cost.input_shapes),
            "calls": cost.count / rounds,
            "seconds": cost.self_cpu_time_total / 1e6 / rounds,
        }
        for cost in costs
    ]
    return {"phases": phases, "seconds": sum(phases.values()), "operations": operations}


def main() -> None:
    """Parse, measure, print a table and, if asked, one line of JSON."""
    given = _parse()
    names = [given.only] if given.only else PIPELINES
    settings = [
        Setting(
            pipeline=name,
            precision=given.precision,
            length=given.length,
            hidden=given.hidden,
            vocabulary=given.vocabulary,
            teacher_vocabulary=given.vocabulary + 5248,
            seed=given.seed,
        )
        for name in names
    ]
    found: dict[str, Any]
    if given.profile:
        found = {
            setting.pipeline: run_ranks(profile, (setting, given.rounds), 1, "cpu") for setting in settings
        }
    elif given.ranks > 1:
        setting = settings[0]
        found = {
            setting.pipeline: compare_ranks(setting, given.rounds, given.ranks, given.head_ranks),
            "ranks": given.ranks,
            "head_ranks": given.head_ranks,
        }
    else:
        found = run_ranks(measure, (settings, given.rounds), 1, "cpu")
    for pipeline in names:
        for name, value in found.get(pipeline, {}).items():
            _show(pipeline, name, value)
    facts = dataclasses.asdict(settings[0])
    facts = {name: value for name, value in facts.items() if name != "pipeline"}
    if given.json:
        print(json.dumps({**found, **facts, "rounds": given.rounds, "threads": 1, **machine()}))


def _show(pipeline: str, name: str, value: Any) -> None:
    """Print one figure, or a list of operations line by line."""
    if name != "operations":
        print(f"{pipeline:8}{name:24}{value}")
        return
    for cost in value:
        print(f"{pipeline:8}{cost['seconds']:9.4f} s {cost['calls']:6.0f}x {cost['name']:32}{cost['shapes']}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--only", choices=PIPELINES)
    numbers = {"rounds": 5, "ranks": 1, "head-ranks": 1, "seed": 0}
    for name, value in {**numbers, "length": 512, "hidden": 256, "vocabulary": 151_936}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--profile", action="store_true", help="where our step's time goes")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
