"""`tide sample`: see what a model writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tide_megatron.api.replies import Opened, SampleOptions
from tide_megatron.commands.options import (
    BlockSizeOption,
    ContextOption,
    DeviceOption,
    EngineOption,
    Fp8Option,
    PrecisionOption,
    RanksOption,
    ShowOrderOption,
    with_fields_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tide_megatron.tasks.sampling import Sampled


@with_fields_of(SampleOptions, "options")
def sample(
    model: Annotated[Path, typer.Argument(help="A run's folder, one of its checkpoints, or a model folder.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: one a line from stdin.")] = None,
    options: SampleOptions = SampleOptions(),  # noqa: B008 - frozen; becomes an option of each of its fields
    show_order: ShowOrderOption = False,
    context: ContextOption = None,
    block_size: BlockSizeOption = None,
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
    from tide_megatron.api.checks import arithmetic_of
    from tide_megatron.launch.signals import stopped_code, watch_signals
    from tide_megatron.parallel.collectives import is_first

    asked = prompts or ([] if options.input is not None else _lines())
    opened = Opened(model, arithmetic_of(precision, engine, fp8), context, block_size, ranks, device)
    sampled = opened.sample(asked, options)
    if is_first():
        if options.out is None or show_order:
            _print(sampled, show_order=show_order)
        if options.out is not None:
            typer.echo(f"{options.out}: {len(sampled)} replies", err=True)
    with watch_signals() as stop:  # the command's own
        if stop.requested:
            raise typer.Exit(stopped_code())


def _lines() -> list[str]:
    from tide_megatron.base.errors import DataError

    try:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as fault:
        raise DataError(f"prompts: stdin is no UTF-8 text ({fault.reason}); convert it first") from None


def _print(sampled: Sequence[Sampled], *, show_order: bool) -> None:
    import rich
    from rich.markup import escape

    from tide_megatron.decode.order import coloured, legend

    for one in sampled:
        rich.print(f"[bold]{escape(one.messages[-1]['content'])}[/]")
        rich.print(coloured(one.cells, one.reply.forwards) if show_order else escape(one.reply.text))
        rich.print(legend(one.reply.forwards) if show_order else "")
