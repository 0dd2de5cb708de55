"""`tide status`: what a run does, or what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def status(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known as JSON.")] = False,
    watch: Annotated[
        float | None, typer.Option(min=1.0, help="Look again every so many seconds, until Ctrl-C.")
    ] = None,
) -> None:
    """Say of runs what they do: progress, losses, time to go, checkpoint, restarts and why.

    Of a run that is queued, was stopped, failed or was killed, too. Any machine that sees the folder will do;
    status.html in it is the same for a browser.

    Example: tide status runs/kl

    Example: tide status runs/* --watch 10
    """
    from tide_megatron.base.files import local_path
    from tide_megatron.launch.status import follow, look

    folders = [local_path(run) for run in runs]
    if as_json:
        found = [look(folder).values() for folder in folders]
        typer.echo(json.dumps(found if len(found) > 1 else found[0], indent=1))
        return
    follow(folders, watch)
