"""Learn from a teacher with the same tokenizer, on 4 CPU ranks: TIDAL along each axis, with CompDemo or not.

    make shared-tokenizer         the most telling variants, one seed
    make shared-tokenizer-full    all variants, three seeds

The quickstart's mixture, base student, data and settings; see examples/quickstart/run.py. TIDAL's target
moves from the student to the teacher with the run (`training`), with falling noise (`timestep`), or with both
(`tidal_both`, the paper's choice); KL is beside it. `_demo` is CompDemo: the teacher sees half of what the
student does not, in two complementary views. Writes runs/shared_tokenizer/result.json, report.md and plots.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from comparison import SEEDS, Comparison, Teacher, hard_twin, in_words
from data import ensure_data

from tide_megatron.base.log import start_log
from tide_megatron.evaluate.report import paired_difference
from tide_megatron.parallel.layout import Layout

DATA = Path("runs/quickstart-data")
MOE = Teacher(
    name="moe",
    folder=Path("examples/quickstart/models/teacher"),
    data=DATA / "test",
    layout=Layout(expert=4),
)
KL_WEIGHT, TIDAL_WEIGHT = 8.0, 16.0
"""Chosen on the dev split, as in the quickstart (docs/log.md); the hard twin has KL's."""
DEMO = MOE.demonstrate()
KL = MOE.listen("kl", KL_WEIGHT, "temperature=1")
BOTH, TRAINING, TIMESTEP = (
    MOE.listen("tidal", TIDAL_WEIGHT, f"axes={axes}") for axes in ("both", "training_only", "timestep_only")
)
QUICK = {
    "undistilled": [],
    "hard_twin": hard_twin(KL_WEIGHT),
    "kl": KL,
    "tidal_both": BOTH,
    "tidal_training": TRAINING,
    "tidal_timestep": TIMESTEP,
    "tidal_training_demo": [*TRAINING, *DEMO],
}
FULL = {
    "kl_demo": [*KL, *DEMO],
    "tidal_both_demo": [*BOTH, *DEMO],
    "tidal_timestep_demo": [*TIMESTEP, *DEMO],
}


def main(
    full: Annotated[bool, typer.Option("--full", help="All variants, three seeds.")] = False,
) -> None:
    """Run the comparison."""
    start_log(0)
    began = time.monotonic()
    ensure_data(DATA)
    comparison = Comparison(
        title="One tokenizer: TIDAL along each axis, with and without CompDemo",
        recipe=Path("configs/runs/quickstart.yaml"),
        out=Path("runs/shared_tokenizer"),
        held_out=DATA / "test",
        teachers=(MOE,),
        matched="tidal_training",
        variants=QUICK | (FULL if full else {}),
    )
    seeds = SEEDS if full else SEEDS[:1]
    results = comparison.run(seeds)
    summary = comparison.summarise(results, seeds)
    comparison.write(results, summary, notes(summary, results[0]), began)


def notes(summary: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """Say in words what the figures do and do not claim."""
    axes = [name for name in ("tidal_both", "tidal_training", "tidal_timestep") if name in summary]
    best = min(axes, key=lambda name: summary[name]["nll_per_byte"])
    gain, twin = (summary[best]["differences"][name] for name in ("undistilled", "hard_twin"))
    demo = paired_difference(
        first["tidal_training_demo"]["sample_nll_per_byte"], first["tidal_training"]["sample_nll_per_byte"]
    )
    low, high = demo.ci95
    cost = summary["tidal_training_demo"]["cpu_seconds"] / summary["tidal_training"]["cpu_seconds"]
    return [
        f"Of TIDAL's axes {best} did best: {gain['mean']:+.4f} nats/byte to the undistilled run "
        f"({in_words(gain)}), {twin['mean']:+.4f} to the hard twin ({in_words(twin)}); "
        "chosen on these samples.",
        f"CompDemo changed tidal_training by {demo.mean:+.4f} nats/byte (95 % interval {low:+.4f} to "
        f"{high:+.4f}) for {cost:.1f} times its CPU time.",
    ]


if __name__ == "__main__":
    typer.run(main)
