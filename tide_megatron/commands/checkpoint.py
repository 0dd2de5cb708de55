"""`tide checkpoint inspect|verify|diff`: what is inside, is it whole, how do two differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tide_megatron.commands.options import print_whole

Place = Annotated[Path, typer.Argument(help="A step-* folder; or a run folder, for its newest checkpoint.")]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

app = typer.Typer(help="Look into training checkpoints.", no_args_is_help=True)


@app.command()
def inspect(
    path: Place,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, too.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is: step, samples, recipe, data, versions, sizes.

    Example: tide checkpoint inspect runs/kl --tensors
    """
    from rich.markup import escape
    from rich.table import Table

    from tide_megatron.base.files import local_path
    from tide_megatron.checkpoint.inspect import facts_of, tensors_of, values_of

    path = local_path(path)
    if as_json:
        typer.echo(json.dumps(values_of(path, tensors=tensors), indent=1))
        return
    shown = Table(box=None, show_header=False)
    for name, value in facts_of(path).items():
        shown.add_row(name, escape(value))
    print_whole(shown)
    if tensors:
        listed = Table("tensor", "shape", "dtype", box=None)
        for row in tensors_of(path):
            listed.add_row(*row)
        print_whole(listed)


@app.command()
def verify(
    path: Place,
    record: Annotated[
        bool, typer.Option("--record", help="First write digests.json into a model folder that has none.")
    ] = False,
) -> None:
    """Read every file of a checkpoint and compare its digest. The exit code is 2 if it is not whole.

    Takes model folders, too: their weights are compared again whenever they are loaded. Record what you have
    downloaded once, and a copy of it that was cut off is noticed.

    Example: tide checkpoint verify runs/kl/checkpoints/step-00000200-000000012800

    Example: tide checkpoint verify models/wedlm --record
    """
    from tide_megatron.base.errors import CheckpointError
    from tide_megatron.base.files import damage, local_path, read_digests, record_digests
    from tide_megatron.checkpoint.retention import chosen
    from tide_megatron.models.hf.folder import WEIGHTS, check_weights

    path = local_path(path)
    if record:
        check_weights(path)
        record_digests(path, WEIGHTS)
    found = chosen(path)
    faults = damage(found)
    if faults:
        lines = "\n  ".join(faults)
        raise CheckpointError(f"{found} is not whole:\n  {lines}\na run goes on from the newest whole one")
    typer.echo(f"{found} is whole: {len(read_digests(found))} files")


@app.command()
def diff(first: Place, second: Place, as_json: Json = False) -> None:
    """Show how two checkpoints differ: recipes, clocks, and the tensors that are not equal.

    Example: tide checkpoint diff runs/a runs/b
    """
    from rich.table import Table

    from tide_megatron.base.files import local_path
    from tide_megatron.checkpoint.inspect import difference_values, metadata_differences, tensor_differences
    from tide_megatron.checkpoint.retention import chosen

    one, other = chosen(local_path(first)), chosen(local_path(second))
    if as_json:
        typer.echo(json.dumps(difference_values(one, other), indent=1))
        return
    for line in metadata_differences(one, other):
        typer.echo(line)
    shown = Table("tensor", "largest difference", "relative", box=None)
    for found in tensor_differences(one, other):
        numbers = (found.words, "") if found.words else (f"{found.absolute:.3g}", f"{found.relative:.3g}")
        shown.add_row(found.name, *numbers)
    if shown.row_count:
        print_whole(shown)
    else:
        typer.echo("all tensors are equal")
