"""The quickstart: distil a small student from an expert-parallel teacher on 4 CPU ranks, and weigh the gain.

    make quickstart            (or: python examples/quickstart/run.py)
    make quickstart-full       TIDAL beside the chosen loss, and three seeds

The same base student is continued three times at equal steps, tokens, seed and learning rate (tuned for the
first): undistilled (cross-entropy), hard twin (no teacher, but the distilled run's extra weight on the gold
tokens), distilled. The teacher is a LLaDA2-type mixture of experts whose experts are spread over the ranks on
which the student trains data-parallel. Writes runs/quickstart/result.json, report.md and plots.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import rich
import typer
from data import ensure_data

from tide_megatron.base.log import start_log
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.compare import paired_difference
from tide_megatron.evaluate.generate import Sampler
from tide_megatron.evaluate.replies import answer_prompts
from tide_megatron.evaluate.report import Report, Sample, comparison_table
from tide_megatron.evaluate.score import Question, score_folder
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe

# Read when a rank starts. Models this small lose more at the barriers of two threads than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

RECIPE = Path("configs/runs/quickstart.yaml")
OUT = Path("runs/quickstart")
MODELS = Path("examples/quickstart/models")
RANKS = 4
CONTEXT = Context(kind="block_diffusion", block_size=16)

WEIGHT = 8.0
"""Of the distilling term and of its hard twin; chosen on the dev split (docs/log.md)."""
TEACHER = [
    f"teachers.moe.folder={MODELS / 'teacher'}",
    "teachers.moe.context.kind=block_diffusion",
    "teachers.moe.context.block_size=16",
    f"teachers.moe.layout.expert={RANKS}",
]
RUNS: dict[str, list[str]] = {
    "undistilled": [],
    "hard_twin": [
        "losses.twin.kind=cross_entropy",
        "losses.twin.timestep_weight=uniform",
        "losses.twin.normalization=hidden",
        f"losses.twin.weight={WEIGHT}",
    ],
    "distilled": [*TEACHER, "losses.kl.kind=kl", "losses.kl.teacher=moe", f"losses.kl.weight={WEIGHT}"],
}
FULL = {
    "tidal": [
        *TEACHER,
        "losses.tidal.kind=tidal",
        "losses.tidal.teacher=moe",
        "losses.tidal.weight=16",
        "losses.tidal.axes=training_only",
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run's result with its recipe's name."""

    name: str
    seed: int
    result: dict[str, Any]


def run_one(name: str, overrides: list[str], seed: int) -> Outcome:
    """Train one variant on fresh ranks."""
    folder = OUT / (name if seed == 11 else f"{name}-seed{seed}")
    recipe, tree = load_recipe(RECIPE, [f"folder={folder}", f"seed={seed}", *overrides])
    rich.print(f"\n[bold]{name}[/] (seed {seed}): {recipe.steps} steps of {recipe.batch.samples} samples")
    result = run_ranks(train, (recipe, tree, False), RANKS, "cpu")
    return Outcome(name=name, seed=seed, result=result)


def main(full: bool = False) -> None:
    """Run the comparison; --full adds TIDAL and two more seeds."""
    start_log(0)
    began = time.monotonic()
    data = ensure_data(Path("runs/quickstart-data"))
    variants = RUNS | (FULL if full else {})
    seeds = (11, 12, 13) if full else (11,)
    outcomes = [run_one(name, words, seed) for seed in seeds for name, words in variants.items()]
    first = {outcome.name: outcome.result for outcome in outcomes if outcome.seed == seeds[0]}
    if any(not outcome.result["finished"] for outcome in outcomes):
        raise typer.Exit(1)
    question = Question(data=data / "test", context=CONTEXT, samples=512)
    teacher = run_ranks(score_folder, (MODELS / "teacher", question), RANKS, "cpu")
    base = run_ranks(score_folder, (MODELS / "student", question), RANKS, "cpu")
    summary = summarise(first, teacher, seeds, outcomes, time.monotonic() - began)
    (OUT / "result.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    scores = {"base student": base, **first}
    rich.print(comparison_table(scores, "undistilled", teachers={"teacher (moe)": teacher}).rich())
    report = Report(
        title="Quickstart: a mixture of experts teaches a small block-diffusion student",
        scores=scores,
        reference="undistilled",
        teachers={"teacher (moe)": teacher},
        run_folders={name: OUT / name for name in first},
        samples=samples(data),
        notes=notes(summary, first),
    ).write(OUT)
    for line in notes(summary, first):
        rich.print(line)
    rich.print(f"report: {report}, figures: {OUT / 'result.json'} ({summary['seconds']:.0f} s in all)")


def summarise(
    first: dict[str, Any],
    teacher: dict[str, Any],
    seeds: tuple[int, ...],
    outcomes: list[Outcome],
    seconds: float,
) -> dict[str, Any]:
    """Return what result.json holds."""
    kept = ("nll_per_byte", "masked_accuracy", "cpu_seconds")
    summary: dict[str, Any] = {name: {key: result[key] for key in kept} for name, result in first.items()}
    for key, reference in (
        ("paired_difference", "undistilled"),
        ("paired_difference_hard_twin", "hard_twin"),
    ):
        pair = paired_difference(
            first["distilled"]["sample_nll_per_byte"], first[reference]["sample_nll_per_byte"]
        )
        summary[key] = {"mean": pair.mean, "ci95": list(pair.ci95)}
    if len(seeds) > 1:
        summary["seeds"] = [
            {"name": outcome.name, "seed": outcome.seed, **{key: outcome.result[key] for key in kept}}
            for outcome in outcomes
        ]
    layout = f"{{expert={RANKS}}}"
    summary["teachers"] = [{"name": "moe", "layout": layout, "nll_per_byte": teacher["nll_per_byte"]}]
    return summary | {"ranks": RANKS, "seconds": seconds}


def notes(summary: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """Say in words what the figures do and do not claim."""
    plain = summary["undistilled"]["cpu_seconds"]
    cost = summary["distilled"]["cpu_seconds"] / plain
    gain, twin = summary["paired_difference"], summary["paired_difference_hard_twin"]
    word = "better" if gain["mean"] < 0 else "worse"
    return [
        f"At equal steps the distilled student is {abs(gain['mean']):.4f} nats/byte {word} than the "
        f"undistilled one ({_interval(gain)}) and differs from the hard twin by {twin['mean']:+.4f} "
        f"({_interval(twin)}).",
        f"A distilled run took {cost:.1f} times the CPU time of an undistilled one: nothing is claimed at "
        "equal compute. One base student, one teacher, one data set; the interval is over held-out samples.",
    ]


def _interval(pair: dict[str, Any]) -> str:
    low, high = pair["ci95"]
    return f"95 % interval {low:+.4f} to {high:+.4f}"


def samples(data: Path) -> list[Sample]:
    """Let the students answer a few held-out requests."""
    lines = (data / "text" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:400:150]
    chats = [json.loads(line)["messages"] for line in lines]
    prompts = [chat[0]["content"] for chat in chats]
    sampler = Sampler(new_tokens=64, steps=64)
    replies = {
        name: run_ranks(answer_prompts, (OUT / name / "model", prompts, CONTEXT, sampler), 1, "cpu")
        for name in ("undistilled", "distilled")
    }
    return [
        Sample(
            prompt=prompt,
            replies={
                "reference": chat[1]["content"],
                **{name: texts[index] for name, texts in replies.items()},
            },
        )
        for index, (prompt, chat) in enumerate(zip(prompts, chats, strict=True))
    ]


if __name__ == "__main__":
    typer.run(main)
