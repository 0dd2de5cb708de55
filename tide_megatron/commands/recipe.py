"""`tide recipe`: what the keys of a run file mean."""

from __future__ import annotations

from typing import Annotated

import typer


def recipe(
    key: Annotated[
        str, typer.Argument(help="A key or the beginning of one, such as optimizer or teachers.wedlm.layout.")
    ] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all of docs/recipe.md.")] = False,
) -> None:
    """Explain the keys of a recipe: type, default, meaning, the paper's value, machine or mathematics.

    Example: tide recipe optimizer.learning_rate

    Example: tide recipe losses
    """
    from tide_megatron.train.reference import as_markdown, explain

    typer.echo(as_markdown().rstrip() if markdown else explain(key))
