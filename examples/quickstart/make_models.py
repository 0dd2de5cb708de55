"""Make the docstrings' base student and two teachers again, or check the shipped ones against their card.

    make docstrings-models                               (about 35 core-minutes)
    python examples/quickstart/make_models.py --check    score the shipped weights and compare with card.json
    python examples/quickstart/make_models.py --score    score the shipped weights and write the card
    python examples/quickstart/make_models.py --only dense    make one, keep the others and their figures

`teacher` is a LLaDA2-type mixture of experts, `dense` a Qwen3-type model. All are trained by the committed
recipes, on docstring -> function pairs from installed sources; see shipping.py for what is stored beside the
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import rich
import typer
from data import ensure_data
from shipping import Makers, Shipped, agrees_with_card, card_score, score_anew, write_card

from tide_megatron.base.log import start_log
from tide_megatron.diffusion.mask import Context

FOLDER = Path("examples/quickstart/models")
CARD = FOLDER / "card.json"
DATA = Path("runs/quickstart-data")
MODELS = {
    name: Shipped(
        folder=FOLDER / name,
        recipe=Path(f"configs/runs/quickstart_{name}.yaml"),
        context=Context(kind="block_diffusion", block_size=16),
        data=DATA / "test",
    )
    for name in ("student", "teacher", "dense")
}


def main(
    check_only: Annotated[bool, typer.Option("--check", help="Only compare the shipped weights.")] = False,
    anew: Annotated[
        bool, typer.Option("--score", help="Only score the shipped weights for the card, after new data.")
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
    ensure_data(DATA)
    if anew:
        score_anew(CARD, MODELS)
    elif not check_only:
        what = "docstring -> function models of the quickstart; toys, for showing the engine"
        write_card(CARD, what, DATA / "text", MODELS, Makers(runs=runs, only=only or ()))
    good = agrees_with_card(CARD, MODELS)
    for name in ("teacher", "dense"):
        gap = card_score(CARD, "student") - card_score(CARD, name)
        rich.print(f"{name} is {gap:.3f} nats/byte better than the base student (at least 0.3 is wanted)")
        good &= gap >= 0.3
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
