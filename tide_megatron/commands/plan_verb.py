"""`tide plan`: which layouts fit how many GPUs, before there is a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tide_megatron.commands.options import print_whole

GpusOption = Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of GPUs to plan for.")]
ExplainOption = Annotated[
    int | None, typer.Option(min=0, help="Also tell what this rank of the best layout holds and sends.")
]


def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML run file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, dotted keys; the last word.")
    ] = None,
    gpus: GpusOption = "8",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that need no network.")] = 8,
    memory: Annotated[str, typer.Option(help="Of one GPU.")] = "80GB",
    reserve: Annotated[str, typer.Option(help="Of it, for what a plan does not count.")] = "6GB",
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sample; default: data.fixed_length.")
    ] = None,
    records: Annotated[int, typer.Option(min=1, help="Layouts to step for each number.")] = 3,
    explain: ExplainOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find layouts that fit, from config.json files alone: no GPU, weights or data.

    The fullest rank of the most promising layouts is built and stepped on tensors without numbers.

    Example: tide plan run.yaml --gpus 8,16,64

    Example: tide plan run.yaml batch.samples=256 --gpus 32 --memory 141GB --explain 0

    """
    from tide_megatron.base.units import read_bytes
    from tide_megatron.plan.planning import Machine, explained, read_numbers
    from tide_megatron.plan.planning import plan as find
    from tide_megatron.plan.tables import memory_table, options_table, sent_table

    machine = Machine(
        per_node=gpus_per_node,
        memory=read_bytes(memory, "--memory"),
        reserve=read_bytes(reserve, "--reserve"),
    )
    numbers = read_numbers(gpus)
    answers = find(recipe, overrides or [], numbers, machine, length=length, records=records)
    chosen = None if explain is None else explained(answers, explain)
    if as_json:
        options = [option.plain() for answer in answers for option in answer.options]
        found = {"options": options} if chosen is None else {"options": options, "explained": chosen.plain()}
        typer.echo(json.dumps(found, indent=1))
        return
    print_whole(options_table(answers))
    if chosen is not None:
        print_whole(memory_table(chosen))
        print_whole(sent_table(chosen))
