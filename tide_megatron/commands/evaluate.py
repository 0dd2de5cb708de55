"""`tide evaluate`: held-out scores of any model folder, and what it can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tide_megatron.api.scores import TaskOptions
from tide_megatron.commands.options import (
    BlockSizeOption,
    ContextOption,
    DeviceOption,
    EngineOption,
    Fp8Option,
    PrecisionOption,
    RanksOption,
    print_whole,
    with_fields_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@with_fields_of(TaskOptions, "on_tasks")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a model folder.")],
    data: Annotated[
        Path | None, typer.Option(help="Data folder, prepared with the model's tokenizer.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Tasks, also lm-evaluation-harness's; `paper`: its eight."),
    ] = None,
    on_tasks: TaskOptions = TaskOptions(),  # noqa: B008 - frozen; becomes an option of each of its fields
    samples: Annotated[int, typer.Option(min=1, help="How many samples of the data are scored.")] = 256,
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
    """Score a model on held-out data (nats a byte of reply, by noise level), on tasks, or on both.

    Masks and levels are those of every run's evaluations, so the scores compare with result.json's. A
    teacher's --fp8 and --engine show what they cost it before a run listens to it.

    Answers to tasks are written as they come: the same command goes on after a kill.

    Example: tide evaluate models/teacher --data data/held_out --context block_causal --block-size 32 --json

    Example: tide evaluate runs/kl --tasks humaneval --limit 20 --against evaluations/base

    Example: tide evaluate runs/kl --tasks paper --ranks 8
    """
    from tide_megatron import api
    from tide_megatron.parallel.collectives import is_first

    named = tasks.split(",") if tasks else []
    shared: dict[str, Any] = {"context": context, "block_size": block_size, "ranks": ranks, "device": device}
    shared |= {"precision": precision, "engine": engine, "fp8": fp8, "samples": samples}
    found = api.evaluate(model, data, tasks=named, on_tasks=on_tasks, times=_levels(times), **shared)
    if not is_first():
        return
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    if data is not None:
        _print_scores(f"{model}: {found['samples']} samples of {data}, read {found['context']}", found)
    if named:
        _print_tasks(found, named, str(on_tasks.against))


def _levels(words: str) -> list[float]:
    from tide_megatron.base.errors import ConfigError

    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(f"--times: {words!r} are no numbers; write for example 0.3,0.7") from None


def _print_scores(title: str, scores: Mapping[str, Any]) -> None:
    import rich
    from rich.table import Table

    table = Table("noise", "nats a byte", "nats a masked token", "masked accuracy", box=None)
    for row in scores["by_time"]:
        names = ("time", "nll_per_byte", "nll_per_token", "masked_accuracy")
        table.add_row(*(f"{row[name]:.4g}" for name in names))
    table.add_row("all", f"{scores['nll_per_byte']:.4g}", "", f"{scores['masked_accuracy']:.4g}")
    rich.print(title)
    rich.print(table)


def _print_tasks(found: Mapping[str, Any], words: Sequence[str], against: str) -> None:
    from tide_megatron.tasks.page import tables
    from tide_megatron.tasks.suite import chosen_entries

    shown, notes = tables(found, chosen_entries(words), against)
    for table in shown:
        print_whole(table.rich())
    for note in notes:
        typer.echo(note)
    typer.echo(f"Answers, scores and this table: {found['out']}")
