"""Make the teacher of the cross-tokenizer example again, or check the shipped one against its card.

    make cross-models                                        (about 15 core-minutes)
    python examples/cross_tokenizer/make_models.py --check   score the shipped weights, compare with card.json
    python examples/cross_tokenizer/make_models.py --score   score the shipped weights and write the card

The teacher has its own tokenizer and template (teacher_tokenizer.py) and reads one sequence in both
directions. Its bound is in nats per byte like the base student's, but of another kind: a bidirectional model
sees hidden text of the whole reply at one noise level, a block-diffusion one clean text before its block.
The two say roughly how much either knows of a byte; no test of significance may be made between them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import rich
import typer
from pairs import TEACHER, TEXT, ensure_teacher_data

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from shipping import Makers, Shipped, agrees_with_card, card_score, score_anew, write_card

from tide_megatron.base.log import start_log
from tide_megatron.diffusion.mask import Context

CARD = TEACHER.parent / "card.json"
STUDENT_CARD = Path("examples/quickstart/models/card.json")


def main(
    check_only: Annotated[bool, typer.Option("--check", help="Only compare the shipped weights.")] = False,
    anew: Annotated[
        bool, typer.Option("--score", help="Only score the shipped weights for the card, after new data.")
    ] = False,
    runs: Annotated[Path | None, typer.Option(help="Take the finished run `teacher` from here.")] = None,
) -> None:
    """Train the teacher and write weights and card, or check it."""
    start_log(0)
    teacher = Shipped(
        folder=TEACHER,
        recipe=Path("configs/runs/cross_tokenizer_teacher.yaml"),
        context=Context(kind="bidirectional"),
        data=ensure_teacher_data() / "test",
    )
    models = {"teacher": teacher}
    if anew:
        score_anew(CARD, models)
    elif not check_only:
        what = "docstring -> function teacher with a tokenizer and template of its own; a toy"
        write_card(CARD, what, TEXT, models, Makers(runs=runs))
    agrees = agrees_with_card(CARD, models)
    gap = card_score(STUDENT_CARD, "student") - card_score(CARD, "teacher")
    rich.print(
        f"the teacher's bidirectional bound is {gap:.3f} nats/byte below the base student's block-diffusion "
        "bound (two kinds of bound: a rough comparison; at least 0.3 is wanted)"
    )
    if not agrees or gap < 0.3:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
