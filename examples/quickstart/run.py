"""The quickstart: distil a small student from an expert-parallel teacher on 4 CPU ranks, and weigh the gain.

    make quickstart            (or: python examples/quickstart/run.py)
    make quickstart-full       TIDAL beside the chosen loss, and three seeds

The same base student is continued three times at equal steps, tokens, seed and learning rate (tuned for the
first): undistilled (cross-entropy), hard twin (no teacher, but the distilled run's extra weight on the gold
tokens), distilled. The teacher is a LLaDA2-type mixture of experts whose experts are spread over the ranks on
which the student trains data-parallel. Writes runs/quickstart/result.json, report.md and plots.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from comparison import SEEDS, Comparison, Teacher, hard_twin, in_words
from data import ensure_data

from tide_megatron.base.log import start_log

MODELS = Path("examples/quickstart/models")
WEIGHT = 8.0
"""Of the distilling term and of its hard twin; chosen on the dev split (docs/log.md)."""
DATA = Path("runs/quickstart-data")
TEACHER = Teacher(folder=MODELS / "teacher", data=DATA / "test")
RUNS = {
    "undistilled": [],
    "hard_twin": hard_twin(WEIGHT),
    "distilled": TEACHER.listen("kl", WEIGHT),
}
FULL = {"tidal": TEACHER.listen("tidal", 16, "axes=training_only")}


def main(full: bool = False) -> None:
    """Run the comparison; --full adds TIDAL and two more seeds."""
    start_log(0)
    began = time.monotonic()
    ensure_data(DATA)
    comparison = Comparison(
        title="Quickstart: a mixture of experts teaches a small block-diffusion student",
        recipe=Path("configs/runs/quickstart.yaml"),
        out=Path("runs/quickstart"),
        held_out=DATA / "test",
        teacher=TEACHER,
        variants=RUNS | (FULL if full else {}),
        shown=("undistilled", "distilled"),
    )
    seeds = SEEDS if full else SEEDS[:1]
    results = comparison.run(seeds)
    summary = comparison.summarise(results, seeds)
    gains = summary["distilled"]["differences"]
    summary["paired_difference"] = gains["undistilled"]
    summary["paired_difference_hard_twin"] = gains["hard_twin"]
    comparison.write(results, summary, notes(summary), began)


def notes(summary: dict[str, Any]) -> list[str]:
    """Say in words what the figures do and do not claim."""
    cost = summary["distilled"]["cpu_seconds"] / summary["undistilled"]["cpu_seconds"]
    gain, twin = summary["paired_difference"], summary["paired_difference_hard_twin"]
    word = "better" if gain["mean"] < 0 else "worse"
    return [
        f"At equal steps the distilled student is {abs(gain['mean']):.4f} nats/byte {word} than the "
        f"undistilled one ({in_words(gain)}) and differs from the hard twin by {twin['mean']:+.4f} "
        f"({in_words(twin)}).",
        f"A distilled run took {cost:.1f} times the CPU time of an undistilled one: nothing is claimed at "
        "equal compute. One base student, one teacher, one data set; the interval is over held-out samples.",
    ]


if __name__ == "__main__":
    typer.run(main)
