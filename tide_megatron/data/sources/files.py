"""Which files a source means: one, the shards of a folder or a glob in sorted order, a data set's split.

A folder of `datasets.save_to_disk` says so itself. Of other folders the shards are the files whose names end
as data; where a split or a configuration is asked for, `datasets` resolves which files it has, locally and on
the hub, and downloads nothing of it: from the hub the files come by `huggingface_hub`, into its cache.
"""

from __future__ import annotations

import glob
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tide_megatron.base.errors import DataError, last_line, nearest, some_of
from tide_megatron.base.files import local_path
from tide_megatron.base.read import json_of
from tide_megatron.data.sources.choice import HUB, SourceChoice
from tide_megatron.data.sources.source import STDIN
from tide_megatron.data.sources.tables import library

_PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
ENDINGS = (".parquet", ".arrow", *(f"{kind}{packed}" for kind in (".jsonl", ".ndjson") for packed in _PACKED))
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|valid|validation|dev|eval)(?=[-_./]|$)")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def files_of(choice: SourceChoice) -> Sequence[Path]:
    """Return the files of a source in the order in which they are read.

    Raises:
        DataError: there are none, or it must be said which of them are meant.
        ConfigError: a path that cannot be.
    """
    if choice.path.startswith(HUB):
        return [file for config in choice.configs for file in _from_hub(choice, config)]
    if choice.path == STDIN:
        return [Path(STDIN)]
    path = local_path(choice.path)
    if glob.has_magic(choice.path) and not path.exists():
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not found:
            raise DataError(f"{path}: no file has such a name: check the pattern")
        return found
    if not path.is_dir():
        if choice.config or choice.split:
            raise DataError(f"{path}: is no folder, so it has no split or configuration: leave them out")
        return [path]
    if any((path / name).exists() for name in (_SAVED, _SAVED_SPLITS)):
        return _saved(path, choice)
    if choice.config or choice.split:
        return [file for config in choice.configs for file in _resolved(path, choice, config)]
    return _shards(path)


def _shards(folder: Path) -> Sequence[Path]:
    """Return all data files below a folder; refuse to mix splits."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(ENDINGS)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder}: no data files in this folder ({', '.join(ENDINGS[:3])}, ...): name files")
    splits = {told[-1] for path in found if (told := _SPLIT.findall(str(path.relative_to(folder))))}
    if len(splits) > 1:
        raise DataError(
            f"{folder}: holds the splits {' and '.join(sorted(splits))}: say which (split: train)"
        )
    return found


def _saved(folder: Path, choice: SourceChoice) -> Sequence[Path]:
    """Return the shards of what `datasets` saved."""
    if choice.config:
        raise DataError(f"{folder}: a folder of save_to_disk has no configurations: leave config out")
    if (folder / _SAVED_SPLITS).exists():
        splits = [str(split) for split in _json(folder / _SAVED_SPLITS).get("splits") or []]
        split = choice.split or (splits[0] if len(splits) == 1 else None)
        if split is None:
            raise DataError(
                f"{folder}: holds the splits {' and '.join(splits)}: say which (split: {splits[0]})"
            )
        if split not in splits:
            raise DataError(f"{folder}: no split {split!r}; {nearest(split, splits)}")
        folder = folder / split
    elif choice.split:
        raise DataError(f"{folder}: holds one split, which is not named: leave split out")
    state = _json(folder / _SAVED)
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: saved with an index of rows: save it again with datasets 2 or newer")
    names = [entry.get("filename") for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{folder / _SAVED}: names no data files: save the data set again")
    return [folder / str(name) for name in names]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json_of(file)
    except FileNotFoundError:
        raise DataError(f"{file}: missing: save the data set again or copy the whole folder") from None
    except ValueError as fault:
        raise DataError(f"{file}: cannot be read ({fault}): save the data set again") from None
    return content if isinstance(content, dict) else {}


def _resolved(folder: Path, choice: SourceChoice, config: str | None) -> Iterator[Path]:
    """Yield a local data set's files of a split, as its card or their names say."""
    builder = _builder(str(folder), choice, config, str(folder))
    for url in _of_split(builder, choice, str(folder)):
        path = Path(str(url).removeprefix("file://"))
        if not path.name.endswith(ENDINGS):
            _refuse_ending(str(folder), path.name)
        yield path


def _from_hub(choice: SourceChoice, config: str | None) -> Iterator[Path]:
    """Yield the files of a data set on the hub, fetched into the hub's cache."""
    name = choice.path.removeprefix(HUB)
    hub = library("huggingface_hub", choice.path)
    builder = _builder(name, choice, config, choice.path)
    for url in _of_split(builder, choice, choice.path):
        place = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", str(url))
        if place is None or not place[3].endswith(ENDINGS):
            _refuse_ending(choice.path, str(url))
        try:
            yield Path(hub.hf_hub_download(place[1], place[3], repo_type="dataset", revision=place[2]))
        except Exception as fault:  # of the network, of the hub, of its cache
            _refuse_hub(name, fault)


def _builder(name: str, choice: SourceChoice, config: str | None, place: str) -> Any:
    """Let `datasets` find out which files there are."""
    datasets = library("datasets", place)
    is_hub = place.startswith(HUB)
    try:
        return datasets.load_dataset_builder(name, config, revision=choice.revision if is_hub else None)
    except ValueError as fault:  # which configuration?
        said = " ".join(str(fault).split())
        raise DataError(f"{place}: config {config!r}: {said}") from None
    except Exception as fault:  # every kind of hub, network and file fault
        if is_hub:
            _refuse_hub(name, fault)
        raise DataError(
            f"{place}: no data set that can be read ({last_line(fault)}): name its files"
        ) from None


def _of_split(builder: Any, choice: SourceChoice, place: str) -> list[Any]:
    """Return the names of a split's files."""
    files = dict(builder.config.data_files or {})
    splits = [str(split) for split in files]
    split = choice.split or (splits[0] if len(splits) == 1 else None)
    if split is None:
        raise DataError(f"{place}: holds the splits {some_of(splits)}: say which (split: train)")
    if split not in splits:
        raise DataError(f"{place}: no split {split!r}; {nearest(split, splits)}")
    return list(files[split])


def _refuse_ending(place: str, name: str) -> NoReturn:
    raise DataError(f"{place}: {name} is of no kind that is read here ({', '.join(ENDINGS[:3])}): convert it")


def _refuse_hub(name: str, fault: Exception) -> NoReturn:
    missing = importlib.import_module("huggingface_hub.errors").RepositoryNotFoundError
    if isinstance(fault, missing):
        raise DataError(
            f"{HUB}{name}: no such data set, or it asks for a login (hf auth login): {HUB}OWNER/NAME"
        )
    folder = f"datasets/{name.rpartition('/')[2]}"
    raise DataError(
        f"{HUB}{name}: cannot be had from the hub ({last_line(fault)[:200]}): where there is a network, "
        f"`hf download --repo-type dataset {name} --local-dir {folder}` fetches it; then read {folder}"
    ) from None
