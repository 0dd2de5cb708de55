"""`tide report`: runs on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; differences are to the first.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write report.html into; default: RUN/report of the first.")
    ] = None,
    png: Annotated[bool, typer.Option(help="Also write every figure as a PNG.")] = True,
) -> None:
    """Write a page of a run, or of several side by side: losses, scores, teachers, gradients, speed, starts.

    One HTML file with nothing from elsewhere. Runs that go on, were killed or are of another release are
    shown as far as they can be read.

    Example: tide report runs/kl

    Example: tide report runs/plain runs/kl runs/tidal --out runs/comparison
    """
    from tide_megatron import api

    typer.echo(api.report(runs, out, pngs=png))
