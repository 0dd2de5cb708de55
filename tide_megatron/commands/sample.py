"""`tide sample`: see what a model writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tide_megatron.commands.options import (
    BlockSizeOption,
    ContextOption,
    DeviceOption,
    EngineOption,
    Fp8Option,
    PrecisionOption,
)


def sample(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a model folder.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: one a line from stdin.")] = None,
    context: ContextOption = None,
    block_size: BlockSizeOption = None,
    mask: Annotated[
        str | None, typer.Option(help="The mask token it was trained with; default: its folder's.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 256,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: one a token.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    engine: EngineOption = "auto",
    fp8: Fp8Option = None,
) -> None:
    """Answer prompts with a block sampler; each prompt is one user message in the model's chat template.

    Example: tide sample runs/kl "Return the sum of two numbers." --new-tokens 64
    """
    import rich
    from rich.markup import escape

    from tide_megatron import api
    from tide_megatron.base.errors import DataError

    try:
        asked = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as fault:
        raise DataError(f"prompts: stdin is no UTF-8 text ({fault.reason}); convert it first") from None
    replies = api.sample(
        model,
        asked,
        mask=mask,
        new_tokens=new_tokens,
        steps=steps,
        context=context,
        block_size=block_size,
        device=device,
        precision=precision,
        engine=engine,
        fp8=fp8,
    )
    for prompt, text in zip(asked, replies, strict=False):
        rich.print(f"[bold]{escape(prompt)}[/]\n{escape(text)}\n")
