"""Train students of one teacher in bf16 and in FP8, over seeds: how far do whole runs part.

    python tools/bench/fp8_students.py --steps 200 --seeds 11 12 13

Trains the quickstart's student under its mixture (KL, weight 8, temperature 1) on one CPU rank, once for each
way of holding the teacher and each seed. Needs the quickstart's data (`python examples/quickstart/data.py`).
Prints held-out nats a byte along the runs, the difference to fp32 at the end, paired over samples, and how
far the training losses are apart. FP8 is emulated on a CPU (docs/precision.md), with
all else in fp32; a bf16 teacher takes hours on a CPU without bf16 instructions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tide_megatron import api
from tide_megatron.evaluate.report import paired_difference

RECIPE = Path("configs/runs/quickstart.yaml")
WAYS = {
    "fp32": [],
    "bf16": ["teachers.moe.precision=bf16"],
    "rowwise": ["teachers.moe.fp8.recipe=rowwise"],
    "blockwise": ["teachers.moe.fp8.recipe=blockwise"],
    "tensorwise": ["teachers.moe.fp8.recipe=tensorwise"],
}
TEACHER = [
    "teachers.moe.folder=examples/quickstart/models/teacher",
    "teachers.moe.context.kind=block_diffusion",
    "teachers.moe.context.block_size=16",
    "losses.moe_kl.kind=kl",
    "losses.moe_kl.teacher=moe",
    "losses.moe_kl.weight=8",
    "losses.moe_kl.temperature=1",
]


def student(folder: Path, way: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train one student; return its result with its training losses and held-out scores by step."""
    words = [f"folder={folder}", f"seed={seed}", f"steps={given.steps}", "device=cpu", "metrics.every=10"]
    words += [f"evaluation.every={max(1, given.steps // 4)}", f"evaluation.samples={given.samples}"]
    result = api.train(RECIPE, [*words, *TEACHER, *WAYS[way]], resume=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result["losses"] = [line["loss"] for line in lines if line["kind"] == "train"]
    result["curve"] = {line["step"]: line["nll_per_byte"] for line in lines if line["kind"] == "evaluate"}
    return result


def row(way: str, seed: int, found: dict[str, Any], base: dict[str, Any]) -> str:
    """Write one run in Markdown, against the base's of its seed."""
    pair = paired_difference(found["sample_nll_per_byte"], base["sample_nll_per_byte"])
    apart = statistics.fmean(
        abs(one - other) / other for one, other in zip(found["losses"], base["losses"], strict=True)
    )
    low, high = pair.ci95
    curve = ", ".join(f"{value:.4f}" for value in found["curve"].values())
    return f"| {way} | {seed} | {curve} | {pair.mean:+.4f} ({low:+.4f} to {high:+.4f}) | {apart:.3%} |"


def main() -> None:
    """Parse, train, print a row after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=256, help="held out, of the quickstart's test split")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=["rowwise"])
    parser.add_argument("--base", choices=[*WAYS], default="fp32", help="what differences are taken to")
    given = parser.parse_args()
    ways = [given.base, *(way for way in given.ways if way != given.base)]
    print(f"| teacher | seed | held out, nats a byte | to {given.base} (95 % over samples) | losses apart |")
    print("|---|--:|---|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        for seed in given.seeds:
            base: dict[str, Any] = {}
            for way in ways:
                found = student(Path(place) / f"{way}-{seed}", way, seed, given)
                base = base or found
                print(row(way, seed, found, base), flush=True)


if __name__ == "__main__":
    main()
