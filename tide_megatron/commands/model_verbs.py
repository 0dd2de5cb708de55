"""`tide model`: change a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Change a model folder.", no_args_is_help=True)


@app.callback()
def model() -> None:
    """Change a model folder."""


@app.command("add-mask")
def add_mask(
    folder: Annotated[Path, typer.Argument(help="Model folder with config.json, weights and tokenizer.")],
    target: Annotated[
        Path | None, typer.Argument(help="Folder to make; left out, FOLDER itself is extended.")
    ] = None,
    token: Annotated[str, typer.Option(help="Spelling of the mask token.")] = "<|mask|>",
    noise: Annotated[
        float, typer.Option(help="Noise of the new row, as a share of the deviation of the others.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 42,
) -> None:
    """Give a model that has none a mask token: an entry in its tokenizer, and a row to learn.

    The row is the mean of the rows of all tokens, with noise; in the embedding, and in the output head where
    it is a matrix of its own. A model that has a mask token is refused.

    Example: tide model add-mask models/qwen3-0.6b models/qwen3-0.6b-mask
    """
    import rich
    from rich.markup import escape

    from tide_megatron.convert.add_mask import MaskRow
    from tide_megatron.convert.add_mask import add_mask as add

    added = add(folder, target, MaskRow(token=token, noise=noise, seed=seed))
    rich.print(
        f"{added.folder}: mask token {escape(added.token)} has id {added.token_id}; {added.rows} rows "
        f"({added.rows_before} before) in {escape(', '.join(added.tensors))}"
    )
