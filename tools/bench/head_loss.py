"""What the head loss costs, against the plain way and against the floor of its four matrix products.

    python tools/bench/head_loss.py --json                    (TIDAL and Reverse CALM, bf16, about 10 minutes)
    python tools/bench/head_loss.py --only tidal --precision fp32 --teacher-hidden 4096
    python tools/bench/head_loss.py --rows-sweep --budget-mib 64 --json
    python tools/bench/head_loss.py --ranks 2 --json

Both sides do forward and backward on the same numbers, with as many threads, in turns; figures are medians.
`cpu_ratio`, `wall_ratio`: plain over ours. `over_floor`: our CPU seconds over those of the four products on
the hidden rows in one piece and one fp32 addition into the weight's gradient. `memory_ratio`: high-water
marks of fresh processes above weights, hidden states and the fp32 gradient, which both sides have before.
With `--ranks`, `machine_ratio` is what as many ranks reach that each do the whole work and share nothing but
the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.cost import Cost, apart, machine, median_costs, peak_bytes
from bench.head_case import CLOCK, TEACHER, Case, Setting, draw_case
from bench.plain_head import Model, plain_head_loss, release_gradients
from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss, HeadOptions
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.parallel.vocab_group import VocabGroup

MIB = 2**20
FACTORS = (1, 2, 4, 8, 16)
"""By how much the sweep multiplies the rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How our side runs."""

    budget_mib: int | None = 256
    """None: the device's default."""
    threads: int = 1
    rounds: int = 5
    form: Literal["fused", "plain"] = "fused"
    """`fused`, or `plain`: the autograd form that is its oracle."""
    compiled: bool = False
    """Let torch.compile fuse the elementwise parts of the fused form."""


Result = tuple[torch.Tensor, torch.Tensor]
"""The objective, and the gradient of the student's hidden states."""
Work = Callable[[], Result]


def plain_work(case: Case) -> Work:
    """Return the baseline's forward and backward; the head's gradient is added to the case's."""
    student = Model(
        hidden=case.student.hidden.detach().requires_grad_(True),
        weight=case.student.weight.detach().requires_grad_(True),
    )
    batch, term = case.microbatch, case.term

    def work() -> Result:
        student.hidden.grad = None
        objective = plain_head_loss(student, case.teacher, batch, term)
        release_gradients(objective, student.weight, case.gradient)
        return _result(objective, student.hidden)

    return work


def our_work(case: Case, way: Way, group: dist.ProcessGroup | None = None) -> Work:
    """Return our forward and backward on this rank's samples and its columns of both heads.

    In a group every rank's work is a collective of all; the student's rows are gathered in it.
    """
    hidden, teacher_hidden = case.hidden_rows
    samples, rows = len(case.text.ids), case.rows
    vocab = VocabGroup()
    if group is not None:
        sizes = [len(case.student.weight), len(case.teacher.weight)]
        vocab = VocabGroup.of(sizes, group.size(), group.rank(), group)
    starts = [rank * samples // vocab.size for rank in range(vocab.size + 1)]
    parts = [
        int(((rows.sample >= start) & (rows.sample < stop)).sum())
        for start, stop in itertools.pairwise(starts)
    ]
    gathered = GatheredRows(
        rows=rows, sizes=parts, own=slice(*starts[vocab.rank : vocab.rank + 2]), counts=case.counts
    )
    own = hidden[vocab.own(parts)].clone().requires_grad_(True)
    student = HeadInput(hidden=own, weight=case.student.weight, gradient=case.gradient)
    if way.form == "plain":
        student = dataclasses.replace(student, weight=student.weight.detach().requires_grad_(True))
    first, last = vocab.columns(len(case.teacher.weight))
    answer = HeadInput(
        hidden=teacher_hidden,
        weight=case.teacher.weight[first:last],
        start=first,
        vocabulary=len(case.teacher.weight),
    )
    options = HeadOptions(form=way.form, budget_mib=way.budget_mib, compiled=way.compiled)
    head = HeadLoss(case.losses, vocab, options)  # buffers that it keeps count in the first call's peak

    def work() -> Result:
        own.grad = None
        found = head(student, {TEACHER: answer}, gathered, CLOCK)
        if way.form == "plain":
            release_gradients(found.objective, student.weight, case.gradient)
        else:
            found.objective.backward()
        return _result(found.objective, own)

    return work


def _result(objective: torch.Tensor, hidden: torch.Tensor) -> Result:
    assert hidden.grad is not None, "the objective depends on the student"
    return objective.detach(), hidden.grad


def measure_times(setting: Setting, way: Way) -> dict[str, Any]:
    """Time plain way, ours and floor in turns; return their costs and how large the case was."""
    torch.set_num_threads(way.threads)
    case = draw_case(setting)
    rows = case.hidden_rows
    works = {
        "plain": plain_work(case),
        "ours": our_work(case, way),
        "floor": case.floor(),
    }
    return {
        "costs": median_costs(works, way.rounds),
        "rows": len(rows[0]),
        "teacher_rows": len(rows[1]),
        "positions": case.student.hidden.shape[:2].numel(),
        "teacher_positions": case.teacher.hidden.shape[:2].numel(),
        "noise_levels": [round(level, 3) for level in case.text.time.tolist()],
        "chunks": len(case.text.chunks),
    }


def measure_peak(setting: Setting, way: Way, side: str) -> dict[str, int]:
    """Return one side's extra memory in this process, and the bytes of its hidden rows' gradient."""
    torch.set_num_threads(way.threads)
    small = draw_case(dataclasses.replace(setting, vocabulary=4096, shared=4000, copies=1))
    (
        plain_work(small) if side == "plain" else our_work(small, way)
    )()  # libraries load once, whoever is first
    case = draw_case(setting)
    work = plain_work(case) if side == "plain" else our_work(case, way)
    peak, (_, gradient) = peak_bytes(work)
    return {"peak": peak, "gradient": gradient.nbytes, "rows": int(case.text.masked.sum())}


def compare(setting: Setting, way: Way) -> dict[str, Any]:
    """Measure times in one fresh process and each side's memory in another."""
    found = apart(measure_times, setting, way)
    costs: dict[str, Cost] = found.pop("costs")
    peaks = {side: apart(measure_peak, setting, way, side)["peak"] for side in ("plain", "ours")}
    plain, ours, floor = costs["plain"], costs["ours"], costs["floor"]
    return {
        "cpu_ratio": plain.cpu / ours.cpu,
        "wall_ratio": plain.wall / ours.wall,
        "memory_ratio": peaks["plain"] / peaks["ours"],
        "over_floor": ours.cpu / floor.cpu,
        "cpu_seconds": {name: cost.cpu for name, cost in costs.items()},
        "wall_seconds": {name: cost.wall for name, cost in costs.items()},
        "peak_mib": {side: peak / MIB for side, peak in peaks.items()},
        **found,
    }


def sweep(setting: Setting, way: Way) -> dict[str, Any]:
    """Measure our extra memory as the rows grow, beyond the hidden rows' gradient."""
    table = {}
    for factor in FACTORS:
        found = apart(measure_peak, dataclasses.replace(setting, copies=factor), way, "ours")
        beyond = found["peak"] - found["gradient"]
        table[str(found["rows"])] = {"peak_mib": found["peak"] / MIB, "beyond_mib": beyond / MIB}
    beyond = [entry["beyond_mib"] for entry in table.values()]
    return {"by_rows": table, "largest_over_first": max(beyond) / beyond[0]}


def measure_ranks(setting: Setting, way: Way, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Time one rank alone, each rank for itself and the group on the same rows, in turns, a thread a rank."""
    torch.set_num_threads(1)
    case, group = draw_case(setting), dist.group.WORLD
    alone, together = our_work(case, way), our_work(case, way, group)
    costs: dict[str, list[tuple[float, float]]] = {"alone": [], "apart": [], "together": []}
    for turn in range(way.rounds + 1):
        for name, work in (("alone", alone), ("apart", alone), ("together", together)):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            if name != "alone" or dist.get_rank() == 0:
                work()
            cpu = time.process_time() - cpu
            dist.barrier()
            each: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(each, cpu)
            if turn:
                costs[name].append((time.perf_counter() - wall, max(each)))
    wall, cpu = (
        {name: statistics.median(cost[place] for cost in found) for name, found in costs.items()}
        for place in (0, 1)
    )
    return {
        "wall_ratio": wall["alone"] / wall["together"],
        "machine_ratio": dist.get_world_size() * wall["alone"] / wall["apart"],
        "cpu_ratio": cpu["alone"] / cpu["together"],
        "wall_seconds": wall,
        "busiest_rank_cpu_seconds": cpu,
        "rows": int(case.text.masked.sum()),
    }


def main() -> None:
    """Parse, measure, print a table and, if asked, one line of JSON."""
    given = _parse()
    way = Way(budget_mib=given.budget_mib, threads=given.threads, rounds=given.rounds, form=given.form)
    found: dict[str, Any] = {}
    for loss in [given.only] if given.only else ["tidal", "reverse_calm"]:
        setting = Setting(
            loss=loss,
            precision=given.precision,
            teacher_hidden=given.teacher_hidden,
            length=given.length,
            vocabulary=given.vocabulary,
            shared=given.vocabulary - 290,
            seed=given.seed,
            teacher_halves=given.teacher_halves,
        )
        if given.rows_sweep:
            found[loss] = sweep(setting, way)
        elif given.ranks > 1:
            found[loss] = run_ranks(measure_ranks, (setting, way), given.ranks, "cpu")
        else:
            found[loss] = compare(setting, way)
        for name, value in found[loss].items():
            print(f"{loss:14}{name:26}{value}")
    facts = {"precision": given.precision, "teacher_hidden": given.teacher_hidden, "seed": given.seed}
    if given.json:
        print(json.dumps({**found, **facts, **dataclasses.asdict(way), **machine()}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--form", default="fused", choices=["fused", "plain"])
    parser.add_argument("--only", choices=["tidal", "reverse_calm"])
    # Of small seeds, 5 draws noise levels that hide close to 425 tokens under both losses.
    numbers = {
        "threads": 1,
        "budget-mib": 256,
        "rounds": 5,
        "teacher-hidden": 1024,
        "ranks": 1,
        "seed": 5,
        "teacher-halves": 0,
    }
    for name, value in {**numbers, "length": 512, "vocabulary": 151_936}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows-sweep", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
