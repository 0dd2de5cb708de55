"""What a checkpoint costs training: one written in the background against one that training waits for.

    python tools/bench/checkpoint.py --json                    (the quickstart's student: half a minute)
    python tools/bench/checkpoint.py --shape 0.6b --json       (28 x 1024, V = 151,936, 8.3 GB a checkpoint)

Each way runs in a fresh process on random weights: bf16 parameters with fp32 masters and Adam's moments for
0.6b, fp32 for the quickstart. Between saves the optimizer makes real updates. `stall` is what training stood
still for a save, all of it (copying, planning, table of contents); the first save, which also allocates the
room for the copy, is told apart. `slowdown` is what the updates made while a save was being written took
beyond as many undisturbed ones: on a machine whose cores are all busy, writing takes time from training.
`megatron` is the synchronous save of megatron-core itself, with its gathering of the optimizer and its forked
writers, before anything is digested: what ours replaced. `--load` is a resume in a fresh process:
seconds, and how far the peak of its resident memory rises above what model and optimizer hold, ours beside
megatron-core's own, which reads masters and moments whole on every rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tide_megatron.platform

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.cost import apart, machine
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import Device
from tide_megatron.base.files import commit_folder, damage
from tide_megatron.base.memory import peak_memory_bytes
from tide_megatron.base.stop import StopFlag
from tide_megatron.checkpoint.load import load_checkpoint
from tide_megatron.checkpoint.metadata import RunIdentity
from tide_megatron.checkpoint.retention import Checkpoints, listed
from tide_megatron.checkpoint.save import Saver
from tide_megatron.checkpoint.sharded_state import SHARDING
from tide_megatron.diffusion.mask import Context
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import build_model
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.collectives import barrier, is_first
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.train.recipe import Optimizer
from tide_megatron.train.student import Student

SHAPES: dict[str, dict[str, int]] = {
    "quickstart": {
        "num_hidden_layers": 2,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "vocab_size": 512,
    },
    "80m": {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 102_400,
    },
    "0.6b": {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
}
PRECISION = {"quickstart": "fp32", "80m": "fp32", "0.6b": "bf16"}
UNDISTURBED = 3
"""Updates between two saves."""
WAYS = ("asynchronous", "waiting")
MEGATRON = "megatron"


def make_student(shape: str, device: Device) -> Student:
    """Build a student of a shape with random weights and gradients."""
    config = {
        "model_type": "a2d-qwen3",
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        **SHAPES[shape],
    }
    precision = Precision.on(PRECISION[shape], device)
    how = ModelOptions(device=device, precision=precision, trainable=True)
    model = build_model(ARCHITECTURES["a2d-qwen3"].from_hf(config), make_groups(Layout()), how)
    draw_weights(model, 1)
    return Student(model, Context(kind="block_diffusion", block_size=16), 1, Optimizer(warmup=0.0))


def measure(
    shape: str, way: str, saves: int, folder: Path, *, device: Device, stop: StopFlag
) -> dict[str, Any]:
    """Save again and again between updates on this rank; return what it cost."""
    student, total = make_student(shape, device), 10**6
    clock = Clock(total_steps=total)

    def update() -> float:
        nonlocal clock
        started = time.perf_counter()
        for buffer in student.wrapped.buffers:
            buffer.grad_data.fill_(1e-3)
        assert student.update(clock, finite=True).applied
        clock = clock.after_step(applied=True, samples=1)
        return time.perf_counter() - started

    saver = Saver(
        folder,
        student.model,
        student.optimizer,
        RunIdentity(recipe={}, recipe_digest="", data=""),
        Checkpoints(keep=1, asynchronous=way == "asynchronous"),
    )
    update()
    undisturbed, disturbed = [update() for _ in range(UNDISTURBED)], []
    for _ in range(saves):
        saver.begin(clock, {})
        spent = []
        while saver.is_saving:
            spent.append(update())
            saver.poll()
        disturbed.append(spent)
        undisturbed += [update() for _ in range(UNDISTURBED)]
    usual = statistics.median(undisturbed)
    newest = listed(folder)[-1]
    started = time.perf_counter()
    assert not damage(newest)
    return {
        "stall_seconds": [times.stall for times in saver.times],
        "write_seconds": [times.write + times.complete for times in saver.times],
        "slowdown_seconds": [sum(spent) - usual * len(spent) for spent in disturbed],
        "update_seconds": usual,
        "verify_seconds": time.perf_counter() - started,
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
        "parts_seconds": dataclasses.asdict(saver.times[-1]),
    }


def megatron_saves(shape: str, saves: int, folder: Path, *, device: Device, stop: StopFlag) -> list[float]:
    """Return the seconds of synchronous saves as megatron-core makes them, made durable as ours are."""
    student, seconds = make_student(shape, device), []
    metadata = {**SHARDING, "dp_cp_group": student.groups.dp_cp}
    for number in range(saves):
        started = time.perf_counter()
        final = folder / f"step-{number:08d}-{number:012d}"
        partial = final.with_suffix(".partial")
        if is_first():
            partial.mkdir(parents=True)
        barrier()
        weights = student.model.sharded_state_dict(metadata=metadata)
        optimizer = student.optimizer.sharded_state_dict(weights, is_loading=False, metadata=metadata)
        dist_checkpointing.save(
            {"model": weights, "optimizer": optimizer}, str(partial), content_metadata=dict(SHARDING)
        )
        if is_first():
            commit_folder(partial, final)
        barrier()
        seconds.append(time.perf_counter() - started)
    return seconds


def save_once(shape: str, folder: Path, *, device: Device, stop: StopFlag) -> None:
    """Write one checkpoint."""
    student = make_student(shape, device)
    for buffer in student.wrapped.buffers:
        buffer.grad_data.fill_(1e-3)
    clock = Clock(total_steps=10)
    assert student.update(clock, finite=True).applied
    run = RunIdentity(recipe={}, recipe_digest="", data="")
    saver = Saver(folder, student.model, student.optimizer, run, Checkpoints(asynchronous=False))
    saver.begin(clock.after_step(applied=True, samples=1), {})
    saver.wait()


def load_cost(shape: str, way: str, folder: Path, *, device: Device, stop: StopFlag) -> tuple[float, float]:
    """Load the checkpoint; return seconds and by how much the peak of resident memory rose, in bytes."""
    student, (found,) = make_student(shape, device), listed(folder)
    # Model, masters and gradients are there, moments are not yet: what comes on top of all of them counts.
    numbers = sum(parameter.numel() for parameter in student.model.parameters())
    moments = 2 * 4 * numbers / dist.get_world_size()
    before, started = peak_memory_bytes() + moments, time.perf_counter()
    if way == MEGATRON:
        metadata = {**SHARDING, "dp_cp_group": student.groups.dp_cp}
        weights = student.model.sharded_state_dict(metadata=metadata)
        wanted = student.optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata)
        loaded = dist_checkpointing.load({"model": weights, "optimizer": wanted}, str(found))
        student.model.load_state_dict(loaded["model"])
        student.optimizer.load_state_dict(loaded["optimizer"])
    else:
        load_checkpoint(found, student.model, student.optimizer)
    return time.perf_counter() - started, peak_memory_bytes() - before


def loads(shape: str, ranks: int, at: str) -> dict[str, Any]:
    """Measure a resume both ways."""
    folder, found = Path(tempfile.mkdtemp(dir=at)), {}
    try:
        run_ranks(save_once, (shape, folder / "checkpoints"), ranks, "cpu")
        for way in ("ours", MEGATRON):
            seconds, extra = run_ranks(load_cost, (shape, way, folder / "checkpoints"), ranks, "cpu")
            found[way] = {"seconds": seconds, "extra_bytes": extra}
    finally:
        shutil.rmtree(folder)
    return found


def measured(shape: str, way: str, saves: int, ranks: int, at: str) -> dict[str, Any]:
    """Measure one way in a folder of its own; importable, for a fresh process."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=at))
    try:
        if way == MEGATRON:
            seconds = run_ranks(megatron_saves, (shape, saves, folder / "checkpoints"), ranks, "cpu")
            return {"stall_seconds": seconds}
        found: dict[str, Any] = run_ranks(measure, (shape, way, saves, folder / "checkpoints"), ranks, "cpu")
        return found
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Parse, measure both ways, print a table and, if asked, one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="quickstart", choices=SHAPES)
    parser.add_argument(
        "--saves", type=int, default=4, help="for each way, at least two; the first is told apart"
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load", action="store_true", help="measure a resume only")
    given = parser.parse_args()
    if given.load:
        both = apart(loads, given.shape, given.ranks, given.folder)
        for way, cost in both.items():
            extra = cost["extra_bytes"] / 2**20
            print(f"{way:14}load {cost['seconds']:.2f} s, {extra:.0f} MiB beside what stays")
        if given.json:
            print(json.dumps({"shape": given.shape, "ranks": given.ranks, "resume": both, **machine()}))
        return
    found: dict[str, Any] = {
        way: apart(measured, given.shape, way, given.saves, given.ranks, given.folder) for way in WAYS
    }
    stalls = {way: statistics.median(found[way]["stall_seconds"][1:]) for way in WAYS}
    found["stall_ratio"] = stalls["asynchronous"] / stalls["waiting"]
    if given.shape == "quickstart":  # at 0.6b it wants 30 GB
        own = apart(measured, given.shape, MEGATRON, given.saves, given.ranks, given.folder)
        found[MEGATRON] = own
        found["stall_ratio_megatron"] = stalls[WAYS[0]] / statistics.median(own["stall_seconds"][1:])
    found["first_stall_ratio"] = found["asynchronous"]["stall_seconds"][0] / stalls["waiting"]
    for way in WAYS:
        later = found[way]["slowdown_seconds"][1:]
        print(f"{way:14}stall {stalls[way]:.3f} s, updates slowed by {statistics.median(later):.3f} s a save")
    print(f"{'ratio':14}{found['stall_ratio']:.3f} (first save {found['first_stall_ratio']:.3f})")
    if MEGATRON in found:
        print(f"{'of megatron':14}{found['stall_ratio_megatron']:.3f}: what its own synchronous save takes")
    if given.json:
        print(json.dumps({"shape": given.shape, "ranks": given.ranks, **found, **machine()}))


if __name__ == "__main__":
    main()
