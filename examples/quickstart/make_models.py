"""Make the quickstart's teacher and base student again, or check the shipped ones against their card.

    make quickstart-models                               (about 25 core-minutes)
    python examples/quickstart/make_models.py --check    score the shipped weights and compare with card.json

Both are trained by the committed recipes, on docstring -> function pairs from installed sources; see
shipping.py for what is stored beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import rich
import typer
from data import ensure_data
from shipping import Shipped, agrees_with_card, card_score, write_card

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
    for name in ("student", "teacher")
}


def main(
    check_only: Annotated[bool, typer.Option("--check", help="Only compare the shipped weights.")] = False,
    runs: Annotated[
        Path | None, typer.Option(help="Take finished runs `student` and `teacher` from here.")
    ] = None,
) -> None:
    """Train both models and write weights and card, or check them."""
    start_log(0)
    ensure_data(DATA)
    if not check_only:
        what = "docstring -> function models of the quickstart; toys, for showing the engine"
        write_card(CARD, what, DATA / "text", MODELS, runs)
    agrees = agrees_with_card(CARD, MODELS)
    gap = card_score(CARD, "student") - card_score(CARD, "teacher")
    rich.print(f"the teacher is {gap:.3f} nats/byte better than the base student (at least 0.3 is wanted)")
    if not agrees or gap < 0.3:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
