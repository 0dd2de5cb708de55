"""A Hugging Face model folder, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tide_megatron.base.files import replaced_folder
from tide_megatron.models.folder import CONFIG_FILE
from tide_megatron.models.shards import Plan, Planned, write_tensors

WEIGHTS = (".safetensors", ".distcp")
"""Files whose digests are recorded; the others are text, which people may edit."""


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
    with replaced_folder(folder, WEIGHTS) as partial:
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
