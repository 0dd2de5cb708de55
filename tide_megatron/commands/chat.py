"""`tide chat`: talk with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tide_megatron.api.replies import ReplyOptions
from tide_megatron.commands.options import (
    BlockSizeOption,
    ContextOption,
    DeviceOption,
    EngineOption,
    Fp8Option,
    PrecisionOption,
    ShowOrderOption,
    with_fields_of,
)


@with_fields_of(ReplyOptions, "options")
def chat(
    model: Annotated[Path, typer.Argument(help="A run's folder, one of its checkpoints, or a model folder.")],
    options: ReplyOptions = ReplyOptions(),  # noqa: B008 - frozen; becomes an option of each of its fields
    show_order: ShowOrderOption = False,
    context: ContextOption = None,
    block_size: BlockSizeOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    engine: EngineOption = "auto",
    fp8: Fp8Option = None,
) -> None:
    """Talk with a model: a message a line, replies block by block, /help for commands.

    Ctrl-C ends a reply and keeps the session; Ctrl-D or /quit ends it. Without a terminal every line of stdin
    is a message, and stdout has the replies alone.

    Example: tide chat runs/kl --system "You write Python." --schedule confidence
    """
    from tide_megatron import api

    api.chat(
        model,
        options=options,
        show_order=show_order,
        context=context,
        block_size=block_size,
        device=device,
        precision=precision,
        engine=engine,
        fp8=fp8,
    )
