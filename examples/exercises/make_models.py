"""Make the exercises' base student and two teachers again, or check the shipped ones against their card.

    make quickstart-models                              (about 9 core-minutes)
    python examples/exercises/make_models.py --check    score the shipped weights and compare with card.json
    python examples/exercises/make_models.py --score    score the shipped weights and write the card
    python examples/exercises/make_models.py --only dense    make one, keep the others and their figures

All are trained by the committed recipes, from nothing, on exercises that are drawn from a seed; the card has
their likelihood on held-out ones and how many of the task's questions they answer right.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import rich
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from exercise_data import MODELS as FOLDER
from exercise_data import ensure_exercises
from scoring import Answers
from shipping import Makers, Shipped, agrees_with_card, score_anew, write_card

from tide_megatron.base.log import start_log
from tide_megatron.diffusion.mask import Context

CARD = FOLDER / "card.json"
DATA = Path("runs/exercises-data")
WANTED = {"student": (0.10, 0.60), "dense": (0.85, 1.0), "moe": (0.85, 1.0)}
"""Between which shares of right answers a model has to be: there is something to teach, and to learn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering(Shipped):
    """A shipped model that is also asked the task's questions."""

    def score(self) -> dict[str, Any]:
        """Score likelihood and exact match of the shipped weights."""
        return {**super().score(), **Answers.of(self.folder).summary()}


MODELS = {
    name: Answering(
        folder=FOLDER / name,
        recipe=Path(f"configs/runs/exercises_{name}.yaml"),
        context=Context(kind="block_diffusion", block_size=8),
        data=DATA / "test",
    )
    for name in WANTED
}


def main(
    check_only: Annotated[bool, typer.Option("--check", help="Only compare the shipped weights.")] = False,
    anew: Annotated[
        bool, typer.Option("--score", help="Only score the shipped weights for the card.")
    ] = False,
    runs: Annotated[
        Path | None, typer.Option(help="Take finished runs of the models' names from here.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Make this model only (repeatable).")] = None,
) -> None:
    """Train the models and write weights and card, or check them."""
    start_log(0)
    unknown = set(only or ()) - set(MODELS)
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(MODELS)}")
    ensure_exercises(DATA)
    if anew:
        score_anew(CARD, MODELS)
    elif not check_only:
        what = "models of the quickstart that do exercises; toys, for showing the engine"
        write_card(CARD, what, DATA / "text", MODELS, Makers(runs=runs, only=only or ()))
    good = agrees_with_card(CARD, MODELS)
    card = json.loads(CARD.read_text(encoding="utf-8"))["models"]
    for name, (low, high) in WANTED.items():
        share = card[name]["exact_match"]
        good &= low <= share <= high
        rich.print(f"{name} answers {share:.1%} right (wanted: {low:.0%} to {high:.0%})")
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
