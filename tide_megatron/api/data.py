"""The public functions on prepared data; `tide_megatron.api` has them, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tide_megatron.base.files import local_path

if TYPE_CHECKING:
    from tide_megatron.data.manifest import Manifest
    from tide_megatron.data.sets.inspection import DataFacts, ShownSample

Place = str | Path


def inspect_data(
    data: Place,
    *,
    sample: int = 0,
    page: Place | None = None,
    tokenizer: Place | None = None,
    teachers: Mapping[str, str] | None = None,
) -> tuple[DataFacts, ShownSample]:
    """Look into prepared data.

    Args:
        data: its folder.
        sample: number of the one that is shown.
        page: HTML file to write, with all of it; None: none.
        tokenizer: the student's, as `prepare` had it; None: its tokens are shown as ids.
        teachers: name -> tokenizer, likewise.

    Returns:
        What is known of the whole folder, and the sample as the student and the teachers see it.

    Raises:
        DataError: no prepared data, no such sample, or a tokenizer that did not make the ids.
    """
    from tide_megatron.base.disk import disk_faults
    from tide_megatron.base.errors import DataError
    from tide_megatron.base.files import write_text
    from tide_megatron.data.preparation.sample import SideChoice
    from tide_megatron.data.sets.inspection import Inspection
    from tide_megatron.data.sets.inspection_page import render

    inspection = Inspection(local_path(data))
    places = {**(teachers or {}), **({"": str(tokenizer)} if tokenizer is not None else {})}
    tokenizers = {name: SideChoice.read(place, add_mask=not name).tokenizer for name, place in places.items()}
    facts, shown = inspection.facts(), inspection.sample(sample, tokenizers)
    if page is not None:
        has_text = {name: name in tokenizers for name in ("", *inspection.manifest.sides)}
        with disk_faults(local_path(page), DataError):
            text = render(inspection.folder.name, facts, shown, has_text=has_text)
            write_text(local_path(page), text, is_durable=False)
    return facts, shown


def merge_data(out: Place, folders: Sequence[Place], *, replace: bool = False) -> Manifest:
    """Put prepared data together in a new folder, by bytes; what it is made of stays.

    Args:
        out: folder to make.
        folders: all parts of one `prepare`, in any order, or data sets of one tokenizer, window and teachers,
            whose samples follow one another.
        replace: put it in the place of a data folder that is there.

    Returns:
        What was written.

    Raises:
        DataError: they do not belong together, one is damaged or missing, or the folder may not be replaced.
    """
    from tide_megatron.data.sets.merging import merge

    return merge(local_path(out), [local_path(folder) for folder in folders], replace=replace)


def split_data(
    data: Place,
    first: Place,
    second: Place,
    *,
    share: float | None = None,
    samples: int | None = None,
    held_out: int | None = None,
    sources: Sequence[str] = (),
    seed: int = 0,
    replace: bool = False,
) -> tuple[Manifest, Manifest]:
    """Divide the samples of prepared data among two new folders; say one of four: what the first one gets.

    Args:
        data: the folder, which stays.
        first: folder to make.
        second: folder to make of the rest.
        share: so many of all samples, drawn: a number between 0 and 1.
        samples: so many samples, drawn.
        held_out: all samples but so many, drawn.
        sources: the samples of these sources.
        seed: of the draw; equal seeds draw alike.
        replace: put them in the place of data folders that are there.

    Returns:
        What was written.

    Raises:
        ConfigError: not one choice, or one that leaves a folder empty.
        DataError: the data is damaged, or a folder may not be replaced.
    """
    from tide_megatron.data.sets.splitting import Division, split

    division = Division(share=share, samples=samples, held_out=held_out, sources=sources, seed=seed)
    return split(local_path(data), local_path(first), local_path(second), division, replace=replace)
