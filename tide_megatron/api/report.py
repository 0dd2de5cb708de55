"""The public function that shows runs; `tide_megatron.api` has it, too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tide_megatron.api.data import Place
from tide_megatron.base.files import local_path


def report(runs: Sequence[Place], out: Place | None = None, *, pngs: bool = True) -> Path:
    """Write a page of a run, or of several side by side, from their folders alone.

    Args:
        runs: their folders, in any state; differences are to the first.
        out: folder to write report.html into; None: `report` in the first run's folder.
        pngs: also write every figure as a PNG.

    Returns:
        The page.

    Raises:
        CheckpointError: a folder is no run's, or cannot be read.
        ConfigError: no run, too many, one that is named twice, or a folder that cannot be written.
    """
    from tide_megatron.report.report import write_report

    folders = [local_path(run) for run in runs]
    place = local_path(out) if out is not None else folders[0] / "report" if folders else Path()
    return write_report(folders, place, pngs=pngs)
