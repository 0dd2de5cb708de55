"""From what a data file says to a prepared folder."""

from __future__ import annotations

from pathlib import Path

from tide_megatron.data.manifest import Manifest
from tide_megatron.data.preparation.identity import TaskPart
from tide_megatron.data.preparation.prepare import plan_of, prepare_part, prepare_whole
from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.data.sources.mixture import DataMixture
from tide_megatron.data.sources.opening import find_sources
from tide_megatron.data.sources.record import Reading


def prepare_mixture(
    mixture: DataMixture, out: Path, *, replace: bool, workers: int | None, part: str | None
) -> Manifest | None:
    """Find the sources, load the tokenizers, and prepare.

    Args:
        mixture: what is read, for whom, and what is left out.
        out: the folder to make.
        replace: put the new data in the place of a data folder that is already there.
        workers: processes that encode; None: as many as there are cores.
        part: K/N: only this part of the records; None: all.

    Returns:
        What was written; None: a part alone.

    Raises:
        ConfigError: an option that cannot be, or that nobody says.
        DataError: bad records, no records, or a target that may not be replaced.
    """
    plan = plan_of(
        find_sources(mixture.sources, mixture.of_all),
        SideChoice.read(mixture.student, add_mask=mixture.add_mask).tokenizer,
        max_length=mixture.length,
        on_long=mixture.on_long,
        on_bad=mixture.on_bad,
        reading=Reading.of(normalize=mixture.normalize, learn=mixture.learn),
        sides={name: SideChoice.read(place) for name, place in mixture.teachers.items()},
    )
    if part is None:
        return prepare_whole(plan, out, replace=replace, workers=workers)
    return prepare_part(plan, TaskPart.read(part), out, replace=replace, workers=workers)
