"""`tide export`: a trained student in the form that its readers load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Form = Literal["a2d-qwen3", "sdar", "qwen3", "all"]
"""The keys of `export.formats.FORMATS`, which would import torch here."""


def export(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a model folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; `all` makes one in it for each form.")],
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            "--flavour",
            help="a2d-qwen3: dLLM, TIDE. sdar: SGLang, LMDeploy. qwen3: transformers.",
        ),
    ] = "all",
    shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    dtype: Annotated[Literal["bf16", "fp32", "stored"], typer.Option(help="Of the weights.")] = "stored",
    force: Annotated[bool, typer.Option("--force", help="Replace an export that stands there.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load every form again and compare.")
    ] = True,
) -> None:
    """Write a student with tokenizer, chat template, generation config and model card, and load it back.

    Example: tide export runs/kl OUT --format all

    Example: tide export runs/kl OUT --format sdar --dtype bf16 --shard-size 2GB --force
    """
    import rich

    from tide_megatron import api
    from tide_megatron.export.checks import checks_table

    checks = api.export(
        model,
        out,
        formats=None if form == "all" else [form],
        shard_size=shard_size,
        dtype=dtype,
        force=force,
        verify=verify,
    )
    if verify:
        rich.print(checks_table(checks))
