"""`tide sample`: see what a model writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tide_megatron.commands.options import (
    BlockSizeOption,
    ContextOption,
    DecodingWords,
    DeviceOption,
    EngineOption,
    Fp8Option,
    MaskOption,
    PrecisionOption,
    RanksOption,
    ShowOrderOption,
    SystemOption,
    with_fields_of,
)


@with_fields_of(DecodingWords, "decoding")
def sample(
    model: Annotated[Path, typer.Argument(help="A run's folder, one of its checkpoints, or a model folder.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: one a line from stdin.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help='JSON lines with "prompt" or "messages", in the place of prompts.'),
    ] = None,
    system: SystemOption = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL file of replies; the same command goes on after a kill.")
    ] = None,
    show_order: ShowOrderOption = False,
    replay: Annotated[
        Path | None, typer.Option(help="HTML page to write, which replays how the replies were denoised.")
    ] = None,
    decoding: DecodingWords = DecodingWords(),  # noqa: B008 - frozen; becomes an option of each of its fields
    context: ContextOption = None,
    block_size: BlockSizeOption = None,
    mask: MaskOption = None,
    ranks: RanksOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    engine: EngineOption = "auto",
    fp8: Fp8Option = None,
) -> None:
    """Answer prompts; each is one user message in the model's chat template.

    Example: tide sample runs/kl "Return the sum of two numbers." --new-tokens 64 --show-order

    Example: tide sample runs/kl --input prompts.jsonl --out replies.jsonl --ranks 4
    """
    import rich
    from rich.markup import escape

    from tide_megatron import api
    from tide_megatron.base.errors import DataError
    from tide_megatron.decode.order import coloured, legend
    from tide_megatron.launch.signals import stopped_code, watch_signals
    from tide_megatron.parallel.collectives import is_first

    try:
        is_asked = prompts or input_file is not None
        asked = prompts or ([] if is_asked else [line.rstrip("\n") for line in sys.stdin if line.strip()])
    except UnicodeDecodeError as fault:
        raise DataError(f"prompts: stdin is no UTF-8 text ({fault.reason}); convert it first") from None
    sampled = api.sample_whole(
        model,
        asked,
        decoding.values(),
        input_file=input_file,
        system=system,
        out=out,
        replay=replay,
        mask=mask,
        context=context,
        block_size=block_size,
        ranks=ranks,
        device=device,
        precision=precision,
        engine=engine,
        fp8=fp8,
    )
    if is_first():
        for one in sampled if out is None or show_order else ():
            rich.print(f"[bold]{escape(one.messages[-1]['content'])}[/]")
            rich.print(coloured(one.cells, one.reply.forwards) if show_order else escape(one.reply.text))
            rich.print(legend(one.reply.forwards) if show_order else "")
        if out is not None:
            typer.echo(f"{out}: {len(sampled)} replies", err=True)
    with watch_signals() as stop:  # the command's own
        if stop.requested:
            raise typer.Exit(stopped_code())
