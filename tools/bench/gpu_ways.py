"""A whole training step at the paper's sizes on one GPU: ours, and the reference's way (`plain_step`).

`shared`: WeDLM-8B whole in bf16. `cross`: LLaDA2-mini on one rank, ours in FP8 with grouped experts, the
reference's in bf16 with megatron-core's experts one after the other. The student is Qwen3-0.6B with AdamW.
Weights are random, drawn on the device tensor by tensor; nothing ever exists in bf16 as a whole that is held
in FP8. Both ways read the same microbatch of 8 samples of 512 tokens, both with CompDemo.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from bench.plain_step import plain_step
from bench.shapes import LLADA2_MINI, QWEN3_06B, WEDLM_8B
from bench.step_case import CLOCK, TEACHER, Setting, batch_of, given_of, make_run
from gpu_check.rows import NotMeasured, Place, Row
from gpu_check.step_speed import SMALL, profiled
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.memory import free_bytes, peak_memory_bytes
from tide_megatron.base.peak import peak_flops
from tide_megatron.base.stop import StopFlag
from tide_megatron.base.transfer import moved
from tide_megatron.base.units import in_bytes
from tide_megatron.head.budget import BUDGET_MIB, MIB
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.architecture import Architecture, body_flops
from tide_megatron.models.params import num_local_bytes
from tide_megatron.models.precision import Fp8Options
from tide_megatron.models.shard import Shard
from tide_megatron.train.cost import TRAINED, needed_flops
from tide_megatron.train.recipe import Optimizer
from tide_megatron.train.step import Run, train_step
from tide_megatron.train.step_input import Ahead

Pipeline = Literal["shared", "cross"]
Way = Literal["ours", "reference"]
SAMPLES, LENGTH = 8, 512
TIMED = {"ours": 6, "reference": 4}
"""Steps that count, after two that compile and warm up."""
SMALL_MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
SMALL_MIXTURE |= {"moe_intermediate_size": 32, "num_hidden_layers": 2}
FP32, BF16 = 4, 2
STUDENT_COPIES, TEACHER_COPIES = 4, 2
"""How many fp32 tensors of the logits of all positions the reference's way holds at once: the student's with
their gradient, a softmax of the half that counts and bf16 forms; the teacher's two passes."""


def setting_of(pipeline: Pipeline, way: Way, *, small: bool) -> Setting:
    """Return what a way is measured on; `small`: a rehearsal's."""
    shapes = {"student": QWEN3_06B, "teacher": WEDLM_8B if pipeline == "shared" else LLADA2_MINI}
    is_ours = way == "ours"
    setting = Setting(
        pipeline=pipeline,
        samples=SAMPLES,
        length=LENGTH,
        shapes=shapes,
        optimizer=Optimizer(),
        is_drawn_there=True,
        fp8=Fp8Options() if is_ours and pipeline == "cross" else None,
        experts="auto" if is_ours else "sequential",
    )
    if not small:
        return setting
    shapes = {name: shape | SMALL for name, shape in shapes.items()}
    if pipeline == "cross":
        shapes["teacher"] |= SMALL_MIXTURE
    return dataclasses.replace(
        setting,
        samples=2,
        length=64,
        vocabulary=1_024,
        teacher_vocabulary=1_024,
        shapes=shapes,
        precision="fp32",
    )


def check_way(place: Place, pipeline: Pipeline, way: Way) -> list[Row]:
    """Time one way's steps in this process.

    Raises:
        NotMeasured: the device lacks something, or the reference's way does not fit into its memory.
    """
    try:
        found = asked(measure, (pipeline, way, place.is_rehearsal), place)
    except torch.OutOfMemoryError as fault:
        if way == "ours":
            raise
        raise NotMeasured(f"it does not fit: {str(fault).partition('.')[0]}") from None
    name = f"{pipeline} {way}"
    mfu = "unknown" if found["mfu"] is None else f"{found['mfu']:.1%}"
    text = (
        f"{found['milliseconds']:.0f} ms a step of {found['tokens']} tokens, "
        f"{found['tokens_per_second']:.0f} tokens/s, MFU {mfu}, peak {found['peak_gb']:.1f} GB of "
        f"{found['predicted_gb']:.1f} foreseen"
    )
    rows = [Row(check=name, text=text, figures=found)]
    if "phases" not in found:
        return rows
    ordered = sorted(found["phases"].items(), key=lambda entry: -entry[1])
    told = [f"{phase} {1e3 * seconds:.0f} ms{_of_phase(found, phase)}" for phase, seconds in ordered]
    rows.append(Row(check=f"{name} phases", text=", ".join(told)))
    if "profile_fault" in found:
        rows.append(Row(check=f"{name} profile", verdict="failed", text=found["profile_fault"]))
    if "top" in found:
        top = "; ".join(f"{kernel} x{calls:g} {spent:.2f}" for kernel, calls, spent in found["top"])
        places = "; ".join(f"{where} {calls}" for where, calls in found["places"])
        busy = f"kernels run {found['device_ms']:.0f} of {found['milliseconds']:.0f} ms a step"
        text = f"{busy}; ms by kernel: {top}; host waits by place: {places}"
        rows.append(Row(check=f"{name} profile", text=text))
    return rows


def _of_phase(found: Mapping[str, Any], phase: str) -> str:
    """Say what else is known of a phase."""
    share, peak = found["phase_mfu"].get(phase), found["peak_bytes"].get(phase)
    known = ["" if share is None else f"MFU {share:.1%}", "" if peak is None else f"peak {peak / 1e9:.1f} GB"]
    return f" ({', '.join(filter(None, known))})" if any(known) else ""


def asked(function: Callable[..., dict[str, Any]], args: tuple[Any, ...], place: Place) -> dict[str, Any]:
    """Run a rank function on one rank.

    Raises:
        NotMeasured: the device lacks what it asks for, such as FP8 products.
    """
    try:
        found: dict[str, Any] = run_ranks(function, args, 1, place.device)
    except ConfigError as lack:
        raise NotMeasured(str(lack)) from None
    return found


def measure(pipeline: Pipeline, way: Way, small: bool, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Build models and text, make steps of one microbatch; a rank function."""
    setting = setting_of(pipeline, way, small=small)
    predicted = needed_bytes(setting, way)
    require_room(predicted, device)
    run, batch = make_run(setting, device), batch_of(setting, 0)
    step = _our_step(run, setting) if way == "ours" else _reference_step(run, setting)
    objective = step()
    if not small:
        step()
    settle(device)
    run.phases.take()
    run.phases.take_peaks()
    steps = 1 if small else TIMED[way]
    seconds = timed(step, steps, device)
    tokens, noised = batch.ids.numel(), run.noiser(batch)
    flops = needed_flops(run.student, run.teachers, [noised])
    peak = peak_flops(device.name, torch.bfloat16)
    found = {
        "milliseconds": 1e3 * seconds,
        "objective": objective,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "rows": len(noised.row_index[0]),
        "tflops": flops / seconds / 1e12,
        "mfu": None if peak is None else flops / seconds / peak,
        "peak_gb": peak_memory_bytes() / 1e9,
        "predicted_gb": predicted / 1e9,
        "machine": {"name": device.described, "torch": torch.__version__},
    }
    if way == "ours":
        found |= _by_phase(run, setting, len(noised.row_index[0]), steps, peak)
        found |= _profiled(step) if device.type == "cuda" else {}
    return found


def _profiled(step: Callable[[], object]) -> dict[str, Any]:
    """Return what torch's profiler says of a step; what was timed shall not be lost with it."""
    try:
        return profiled(step)
    except RuntimeError as fault:
        return {"profile_fault": str(fault)[:400]}


def _our_step(run: Run, setting: Setting) -> Callable[[], float]:
    batch = batch_of(setting, 0)
    ahead = Ahead(lambda _: run.read([batch]), 0)

    def step() -> float:
        result = train_step(run, ahead.take(0, is_last=False), CLOCK)
        assert result.update.applied, "the step was skipped"
        return result.objective

    return step


def _reference_step(run: Run, setting: Setting) -> Callable[[], float]:
    given = moved(given_of(run, batch_of(setting, 0)), run.device)
    teacher = run.teachers[TEACHER].model

    def step() -> float:
        objective, update = plain_step(run.student, teacher, given, CLOCK)
        assert update.applied, "the step was skipped"
        return objective

    return step


def _by_phase(run: Run, setting: Setting, rows: int, steps: int, peak: float | None) -> dict[str, Any]:
    """Return seconds a step, peak memory and, where operations can be told apart, MFU of each phase.

    The student's is that of its body: three times a forward pass, over the phases `student` and `backward`;
    products of its head are in the phase `head`, with the teacher's.
    """
    phases = {name: spent / steps for name, spent in run.phases.take().items()}
    student, teacher = run.student, run.teachers[TEACHER]
    lengths = [setting.length] * setting.samples
    body = TRAINED * body_flops(student.model.architecture, student.context, lengths, rows)
    own = phases["student"] + phases["backward"]
    reading = run.noiser(batch_of(setting, 0)).reading(TEACHER)
    context, lengths = teacher.view_builder.reads(reading.host_lengths)
    read = body_flops(teacher.model.architecture, context, lengths, len(reading.index[0]))
    found: dict[str, Any] = {"phases": phases, "peak_bytes": run.phases.take_peaks(), "phase_mfu": {}}
    if peak is None:
        return found | {"student_mfu": None}
    third = body / TRAINED
    found["phase_mfu"] = {
        "student": third / phases["student"] / peak,
        "backward": (body - third) / phases["backward"] / peak,
        "teacher": read / phases["teacher"] / peak,
    }
    return found | {"student_mfu": body / own / peak}


def timed(work: Callable[[], object], calls: int, device: Device) -> float:
    """Return the seconds of a call, by the clock, to its end on the device."""
    settle(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    settle(device)
    return (time.perf_counter() - began) / calls


def settle(device: Device) -> None:
    """Wait until a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return what a config.json describes."""
    return ARCHITECTURES[config["model_type"]].from_hf(config)


def weight_bytes(config: Mapping[str, Any], dtype: torch.dtype, fp8: Fp8Options | None = None) -> int:
    """Return the bytes of a whole model's weights."""
    return _whole(architecture_of(config), dtype, fp8)


@functools.cache
def _whole(architecture: Architecture, dtype: torch.dtype, fp8: Fp8Options | None) -> int:
    return num_local_bytes(architecture, Shard(num_layers=architecture.layers), dtype, fp8)


def needed_bytes(setting: Setting, way: Way) -> int:
    """Return about how much memory a way takes: weights and states counted, activations, logits foreseen."""
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    student, teacher = setting.student_config(), setting.teacher_config()
    trained = weight_bytes(student, dtype)
    held = weight_bytes(teacher, dtype, setting.fp8) + trained
    held += 4 * FP32 * trained // dtype.itemsize  # gradients, masters, two moments
    positions = 2 * setting.samples * setting.length
    kept = positions * student["num_hidden_layers"] * _kept_numbers(student) * BF16
    if way == "ours":
        return held + kept + BUDGET_MIB["cuda"] * MIB + 3 * positions * _kept_numbers(teacher) * BF16
    read = positions if setting.pipeline == "shared" else positions * 5 // 8  # [x_t ; x_0], or one sequence
    logits = positions * STUDENT_COPIES * setting.vocabulary + read * TEACHER_COPIES * setting.teacher_ids
    return held + kept + FP32 * logits


def _kept_numbers(config: Mapping[str, Any]) -> int:
    """Return about how many numbers a layer keeps of a token: its inputs, attention's and feed-forward's."""
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    return (
        4 * config["hidden_size"]
        + 3 * heads * config["head_dim"]
        + config["num_attention_heads"] * config["head_dim"]
        + 4 * config["intermediate_size"]
    )


def require_room(needed: float, device: Device) -> None:
    """Refuse what does not fit, before anything is allocated.

    Raises:
        NotMeasured: with both numbers.
    """
    free = free_bytes(device.torch_device)
    if device.type == "cuda" and needed > free:
        raise NotMeasured(
            f"it needs about {in_bytes(needed)}, and {in_bytes(free)} are free on {device.name}"
        )
