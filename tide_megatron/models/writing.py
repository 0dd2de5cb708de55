"""A Hugging Face model folder written whole or not at all: beside its place, made durable, then renamed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tide_megatron.base.digests import write_digests
from tide_megatron.base.durable import flush
from tide_megatron.base.errors import CheckpointError
from tide_megatron.models.folder import CONFIG_FILE
from tide_megatron.models.shards import Plan, Planned, write_tensors

WEIGHTS = (".safetensors", ".distcp")
"""Files whose digests are recorded; the others are text, which people may edit."""


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, which takes the place of `folder` when the block ends without an error.

    Beside weights their digests are written (`base.digests`). What stood at `folder` goes as a whole, and
    only then; after an error nothing has changed.

    Args:
        folder: where it shall stand.

    Yields:
        An empty folder beside it.

    Raises:
        CheckpointError: the disk refuses.
    """
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    try:
        if old.exists() and not folder.exists():  # an earlier write was killed between two renames
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for inner in {path.parent for path in partial.rglob("*") if path.name.endswith(WEIGHTS)}:
            write_digests(inner, {}, WEIGHTS)
        for path in (*partial.rglob("*"), partial):
            flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        flush(folder.parent)
    except BaseException as fault:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        if isinstance(fault, OSError):
            raise CheckpointError(
                f"{folder}: cannot be written ({fault}); check space and permissions"
            ) from fault
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json into a folder."""
    text = json.dumps(dict(config), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def stream_folder(
    folder: Path,
    config: Mapping[str, Any],
    plan: Plan,
    tensors: Iterable[tuple[str, Tensor]],
    files: Iterable[Path] = (),
) -> None:
    """Write a model folder, its weights as they come.

    Args:
        folder: where it shall stand; an older folder of that name is replaced as a whole.
        config: what config.json says.
        plan: the weights by Hugging Face name.
        tensors: (name, tensor), each of the plan's once, in any order, on any device.
        files: further files to copy into it (tokenizer.json...).

    Raises:
        CheckpointError: when the disk refuses; nothing half-written stays.
    """
    with replaced_folder(folder) as partial:
        write_config(partial, config)
        write_tensors(partial, plan, tensors)
        for file in files:
            shutil.copyfile(file, partial / file.name)


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], files: Iterable[Path] = ()
) -> None:
    """Write a model folder of tensors that are all there, by Hugging Face name; see `stream_folder`."""
    plan = {name: Planned(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    stream_folder(folder, config, plan, tensors.items(), files)
