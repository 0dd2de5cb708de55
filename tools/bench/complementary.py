"""What complementary views cost: one forward over [x_tA ; x_tB ; x_0], two passes, and the plain view.

    python tools/bench/complementary.py                   (Qwen3-0.6B's shape, 512 tokens, about 2 minutes)
    python tools/bench/complementary.py --layers 4 --rounds 3

Random weights of the student's shape stand for a dense block-diffusion teacher; the body alone is timed,
because the head reads the same rows in all three. The three take turns in one process, so that a busy machine
slows them alike; the figure is the median of the ratios of neighbours. All run with the structured attention
kernel unless --attention says otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import torch

from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.diffusion.batch import Batch
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import (
    Complementary,
    complementary_passes,
    complementary_view,
    teacher_view,
)
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

SHAPE = {
    "model_type": "a2d-qwen3",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 1024,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
"""Qwen3-0.6B without its vocabulary, which the body does not read."""
MASK = 1023


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured."""

    layers: int
    length: int
    samples: int
    block: int
    rounds: int
    attention: str
    precision: str


def measure(setting: Setting, *, device: Device, stop: StopFlag) -> dict[str, float]:
    """Time all three in turns on this rank; return seconds and ratios."""
    architecture = ARCHITECTURES["a2d-qwen3"].from_hf({**SHAPE, "num_hidden_layers": setting.layers})
    options = ModelOptions(
        device=device, precision=Precision.on(setting.precision, device), attention=setting.attention
    )
    model = build_model(architecture, make_groups(Layout()), options)
    draw_weights(model, 1)
    seconds: dict[str, list[float]] = {name: [] for name in _works(model, setting, device)}
    for turn in range(setting.rounds + 1):
        for name, work in _works(model, setting, device).items():
            spent = _seconds(work, device)
            if turn:  # the first turn warms up
                seconds[name].append(spent)
    ratios = {
        f"{name} / plain": statistics.median(
            mine / plain for mine, plain in zip(seconds[name], seconds["plain"], strict=True)
        )
        for name in ("one forward", "two passes")
    }
    return {f"{name}, seconds": statistics.median(values) for name, values in seconds.items()} | ratios


def _works(model: TideModel, setting: Setting, device: Device) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    shape = (setting.samples, setting.length)
    ids = torch.randint(0, MASK, shape, generator=torch.Generator().manual_seed(0))
    number = torch.arange(setting.samples)
    batch = Batch(sample_ids=number, epochs=number * 0, ids=ids, labels=ids, reply_bytes=number)
    noised = Noiser(seed=1).at(batch.to(device.torch_device), 0.5)
    reading, context = noised.reading("teacher"), Context(kind="block_diffusion", block_size=setting.block)
    shown = Complementary(seed=1).shown(noised.batch, reading)
    return {
        "plain": lambda: model.rows(teacher_view(reading, context, MASK)),
        "one forward": lambda: model.rows(complementary_view(reading, shown, context, MASK)),
        "two passes": lambda: [
            model.rows(view) for view in complementary_passes(reading, shown, context, MASK)
        ],
    }


def _seconds(work: Callable[[], object], device: Device) -> float:
    """Time one call to its end on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.no_grad():
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Parse, measure on one rank, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"layers": 28, "length": 512, "samples": 1, "block": 32, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--attention", default="structured")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json, device = given.pop("json"), given.pop("device")
    found = run_ranks(measure, (Setting(**given),), 1, device)
    if as_json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:24} {value:.3f}")


if __name__ == "__main__":
    main()
