"""`tide evaluate`: held-out scores of any model folder."""

from __future__ import annotations

import json
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
    RanksOption,
)


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a model folder.")],
    data: Annotated[Path, typer.Option(help="Data folder, prepared with the model's tokenizer.")],
    samples: Annotated[int, typer.Option(min=1, help="How many samples are scored.")] = 256,
    times: Annotated[
        str, typer.Option(metavar="T,...", help="Noise levels that each is masked at.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    context: ContextOption = None,
    block_size: BlockSizeOption = None,
    ranks: RanksOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    engine: EngineOption = "auto",
    fp8: Fp8Option = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all scores as JSON, by sample too.")] = False,
) -> None:
    """Score a model on held-out data: nats a byte of reply and masked accuracy, by noise level.

    A teacher's --fp8 and --engine show what they cost it before a run listens to it.

    Masks and levels are those of every run's evaluations, so the scores compare with result.json's.

    Example: tide evaluate models/teacher --data data/held_out --context block_causal --block-size 32 --json
    """
    import rich
    from rich.table import Table

    from tide_megatron import api
    from tide_megatron.base.errors import ConfigError
    from tide_megatron.parallel.collectives import is_first

    try:
        levels = [float(word) for word in times.split(",")]
    except ValueError:
        raise ConfigError(f"--times: {times!r} are no numbers; write for example 0.3,0.7") from None
    scores = api.evaluate(
        model,
        data,
        samples=samples,
        times=levels,
        context=context,
        block_size=block_size,
        ranks=ranks,
        device=device,
        precision=precision,
        engine=engine,
        fp8=fp8,
    )
    if not is_first():
        return
    if as_json:
        typer.echo(json.dumps(scores, indent=1))
        return
    table = Table("noise", "nats a byte", "nats a masked token", "masked accuracy", box=None)
    for row in scores["by_time"]:
        names = ("time", "nll_per_byte", "nll_per_token", "masked_accuracy")
        table.add_row(*(f"{row[name]:.4g}" for name in names))
    table.add_row("all", f"{scores['nll_per_byte']:.4g}", "", f"{scores['masked_accuracy']:.4g}")
    rich.print(f"{model}: {scores['samples']} samples of {data}, read {scores['context']}")
    rich.print(table)
