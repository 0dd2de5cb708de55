"""`tide evaluate`: held-out scores of any model folder, and what it can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tide_megatron.commands.options import (
    BlockSizeOption,
    ContextOption,
    DeviceOption,
    EngineOption,
    Fp8Option,
    PrecisionOption,
    RanksOption,
    print_whole,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a model folder.")],
    data: Annotated[
        Path | None, typer.Option(help="Data folder, prepared with the model's tokenizer.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Tasks, also of lm-evaluation-harness; or `paper`: its eight."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the tasks' results; default: evaluations/NAME.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another folder of results, to compare with question by question.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most questions of a task, a fixed draw; default: all.")
    ] = None,
    decoding: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Decode otherwise than the task says, as new_tokens=64."),
    ] = None,
    think: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(help="End prompts in an empty thinking block; auto: where the tokenizer has one."),
    ] = "auto",
    draws: Annotated[int, typer.Option(min=1, help="Maskings for the likelihood of each choice.")] = 32,
    include: Annotated[
        Path | None, typer.Option(help="Folder of tasks in lm-evaluation-harness's own form.")
    ] = None,
    unsandboxed: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Let this harness task run generated code in this process."),
    ] = None,
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

    A teacher's --fp8 and --engine show what they cost it before a run listens to it.

    Masks and levels are those of every run's evaluations, so the scores compare with result.json's.

    Answers to tasks are written as they come: the same command goes on after a kill.

    Example: tide evaluate models/teacher --data data/held_out --context block_causal --block-size 32 --json

    Example: tide evaluate runs/kl --tasks humaneval --limit 20 --out results/kl --against results/base

    Example: tide evaluate runs/kl --tasks paper --ranks 8
    """
    from tide_megatron import api
    from tide_megatron.base.errors import ConfigError
    from tide_megatron.parallel.collectives import is_first

    try:
        levels = [float(word) for word in times.split(",")]
    except ValueError:
        raise ConfigError(f"--times: {times!r} are no numbers; write for example 0.3,0.7") from None
    found = api.evaluate(
        model,
        data,
        tasks=tasks.split(",") if tasks else (),
        out=out,
        against=against,
        limit=limit,
        decoding=_options(decoding or ()),
        think=think,
        draws=draws,
        include=include,
        unsandboxed=unsandboxed or (),
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
        typer.echo(json.dumps(found, indent=1))
        return
    if data is not None:
        _print_scores(f"{model}: {found['samples']} samples of {data}, read {found['context']}", found)
    if tasks:
        _print_tasks(found, tasks.split(","), against)


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE, with YAML's values.

    Raises:
        ConfigError: a word without `=`.
    """
    import yaml

    from tide_megatron.base.errors import ConfigError

    found = {}
    for word in words:
        key, is_there, value = word.partition("=")
        if not is_there:
            raise ConfigError(f"--decoding: {word!r} is no KEY=VALUE; write for example new_tokens=64")
        found[key] = yaml.safe_load(value)
    return found


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


def _print_tasks(found: Mapping[str, Any], words: Sequence[str], against: Path | None) -> None:
    from tide_megatron.tasks.suite import chosen_entries
    from tide_megatron.tasks.table import tables

    shown, notes = tables(found, chosen_entries(words), str(against))
    for table in shown:
        print_whole(table.rich())
    for note in notes:
        typer.echo(note)
    typer.echo(f"Answers, scores and this table: {found['out']}")
