"""A training step at real sizes, Qwen3-0.6B beside eight of WeDLM-8B's layers: by place and by operator."""

from __future__ import annotations

import dataclasses
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.shapes import QWEN3_06B, WEDLM_8B
from bench.step_case import CLOCK, Setting, batch_of, make_run
from gpu_check.rows import Place, Row
from tide_megatron.base.device import Device
from tide_megatron.base.memory import peak_memory_bytes
from tide_megatron.base.peak import peak_flops
from tide_megatron.base.stop import StopFlag
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.train.recipe import Optimizer
from tide_megatron.train.step import train_step
from tide_megatron.train.step_input import Ahead

WEDLM_LAYERS = 8
"""Of 36, so that a student and its optimizer fit beside them on one GPU."""
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"head_dim": 16, "intermediate_size": 96, "vocab_size": 1_024}
SAMPLES, LENGTH = 4, 512
"""Of a microbatch, half of what configs/runs/paper_pair.yaml has."""
TIMED, TOP = 8, 20
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
"""Calls in which the host stands still until the GPU is done."""
SAID = "called a synchronizing CUDA operation"
"""What torch says of them in its debug mode."""


def check_step(place: Place) -> list[Row]:
    """Time steps, then profile two, then find who waits in one."""
    found = run_ranks(measure, (place.is_rehearsal,), 1, place.device)
    text = (
        f"{found['milliseconds']:.0f} ms a step of {found['tokens']} tokens, "
        f"{found['tokens_per_second']:.0f} tokens/s, {found['tflops']:.0f} TFLOP/s, "
        f"MFU {_percent(found['mfu'])}, peak {found['peak_gib']:.1f} GiB"
    )
    rows = [Row(check="step speed", text=text, figures=found)]
    if place.is_rehearsal:
        return [*rows, Row(check="step waits", verdict="not measured", text="a CPU waits for nothing")]
    counted = ", ".join(
        f"{name} {calls:g} ({spent:.2f} ms)" for name, (calls, spent) in found["waits"].items()
    )
    places = "; ".join(f"{where} {calls}" for where, calls in found["places"])
    rows.append(Row(check="step waits", text=f"a step: {counted}; by place: {places}"))
    top = "; ".join(f"{name} x{calls:g} {spent:.2f}" for name, calls, spent in found["top"])
    return [*rows, Row(check="step profile", text=f"GPU milliseconds a step: {top}")]


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def measure(small: bool, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Make steps of one microbatch on one rank; a rank function."""
    run, batches = _case(small, device)
    on_cuda = device.type == "cuda"
    ahead = Ahead(lambda _: run.read(batches), 0)

    def step() -> Any:
        return train_step(run, ahead.take(0, is_last=False), CLOCK)

    for _ in range(1 if small else 3):  # compiles what there is to compile
        result = step()
    wait = torch.cuda.synchronize if on_cuda else (lambda: None)
    wait()
    steps = 1 if small else TIMED
    began = time.perf_counter()
    for _ in range(steps):
        result = step()
    wait()
    seconds = (time.perf_counter() - began) / steps
    achieved = result.cost.flops / seconds
    peak = peak_flops(device.name, torch.bfloat16)
    found = {
        "milliseconds": 1e3 * seconds,
        "tokens": result.tokens,
        "rows": result.masked,
        "tokens_per_second": result.tokens / seconds,
        "tflops": achieved / 1e12,
        "mfu": None if peak is None else achieved / peak,
        "peak_gib": peak_memory_bytes() / 2**30 if on_cuda else 0.0,
        "phases": run.phases.take(),
        "peak_bytes": run.phases.take_peaks(),
    }
    return found | (profiled(step) if on_cuda else {})


def _case(small: bool, device: Device) -> tuple[Any, Any]:
    """Build models and text."""
    shapes = {"student": QWEN3_06B, "teacher": WEDLM_8B | {"num_hidden_layers": WEDLM_LAYERS}}
    setting = Setting(
        pipeline="shared",
        samples=SAMPLES,
        length=LENGTH,
        shapes=shapes,
        optimizer=Optimizer(),
        is_drawn_there=not small,
    )
    if small:
        shapes = {name: shape | SMALL for name, shape in shapes.items()}
        setting = dataclasses.replace(
            setting, samples=2, length=64, vocabulary=1_024, shapes=shapes, precision="fp32"
        )
    return make_run(setting, device), [batch_of(setting, 0)]


def profiled(step: Callable[[], Any]) -> dict[str, Any]:
    """Return host waits a step by call and by place, and the kernels that take the GPU's time."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    steps = 2
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    costs = profiler.key_averages()
    waits = {
        cost.key: (cost.count / steps, cost.self_cpu_time_total / 1e3 / steps)
        for cost in costs
        if cost.key in WAITS
    }
    busiest = sorted(costs, key=lambda cost: cost.self_device_time_total, reverse=True)[:TOP]
    top = [(cost.key[:60], cost.count / steps, cost.self_device_time_total / 1e3 / steps) for cost in busiest]
    with who_waits() as places:
        step()
    device_ms = sum(cost.self_device_time_total for cost in costs) / 1e3 / steps
    return {"waits": waits, "top": top, "device_ms": device_ms, "places": places.most_common(TOP)}


@contextmanager
def who_waits() -> Iterator[Counter[str]]:
    """Count, by line of ours or megatron-core's, the calls that make the host wait for the GPU."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if SAID in str(message):
            places[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    """Return the innermost line on the stack that is tide_megatron's or megatron-core's."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("tide_megatron/", "megatron/core/"):
            if package in frame.filename and "gpu_check" not in frame.filename:
                return f"{package}{frame.filename.rpartition(package)[2]}:{frame.lineno}"
    return "elsewhere"
