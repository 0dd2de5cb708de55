"""`tide train`: one run from a recipe, on as many ranks as it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tide_megatron.base.errors import ConfigError
from tide_megatron.commands.options import RanksOption, RanksPerNodeOption, Wanted

BranchOption = Annotated[
    str | None,
    typer.Option(
        metavar="FROM",
        help="Begin with weights and optimizer of another run's checkpoint; short for branch.folder=...",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print recipe, placement and every fault of what is there, and stop."),
]
PreflightOption = Annotated[
    bool,
    typer.Option(
        "--preflight-only", help="Start the ranks, compare and measure them, print what was found, and stop."
    ),
]


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML run file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, dotted keys; the last word. {} empties, null removes."),
    ] = None,
    ranks: RanksOption = None,
    ranks_per_node: RanksPerNodeOption = None,
    device: Annotated[Wanted | None, typer.Option(help="Short for device=... in the recipe.")] = None,
    folder: Annotated[
        str | None, typer.Option(help="Run folder; short for folder=... in the recipe.")
    ] = None,
    branch: BranchOption = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from the run folder, or discard what is there.")
    ] = True,
    dry_run: DryRunOption = False,
    preflight_only: PreflightOption = False,
) -> None:
    """Train a student, with teachers or without, as a recipe says.

    The first Ctrl-C saves and ends the run with exit code 75, and the same command goes on with it; a second
    one ends it at once.

    Example: tide train run.yaml --ranks 4 optimizer.learning_rate=1e-4 losses.kl.weight=2 --dry-run

    Example: tide train run.yaml teachers.wedlm=null losses.kl=null

    Example: tide train second.yaml --branch runs/first

    Example: torchrun --nproc-per-node 8 -m tide_megatron.commands train run.yaml
    """
    if dry_run and preflight_only:
        raise ConfigError("--dry-run starts no ranks and --preflight-only starts all: leave one of them out")
    words = [*(overrides or [])]
    words += [f"device={device}"] if device is not None else []
    words += [f"branch.folder={json.dumps(branch)}"] if branch is not None else []
    words += [f"folder={json.dumps(folder)}"] if folder is not None else []
    if dry_run:
        from tide_megatron.base.files import local_path
        from tide_megatron.launch.ranks import planned_ranks
        from tide_megatron.train.resolve import load_recipe
        from tide_megatron.train.summary import print_summary

        print_summary(
            *load_recipe(local_path(recipe), words), planned_ranks(ranks, ranks_per_node), resume=resume
        )
    elif preflight_only:
        from tide_megatron import api

        api.preflight(recipe, words, ranks=ranks, ranks_per_node=ranks_per_node, resume=resume)
    else:
        from tide_megatron import api
        from tide_megatron.launch.signals import stopped_code

        result = api.train(recipe, words, ranks=ranks, ranks_per_node=ranks_per_node, resume=resume)
        if not result["finished"]:
            raise typer.Exit(stopped_code())
