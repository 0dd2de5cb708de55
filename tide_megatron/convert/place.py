"""Where a Megatron checkpoint stands: Megatron-LM's folders, ours, or the files themselves.

DST/latest_checkpointed_iteration.txt    `release`, or a number
DST/release/                             the torch_dist files (or iter_0000100/)
DST/hf/                                  config.json, tokenizer and what else came with the weights
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.names import LATEST
from tide_megatron.models.hf.config import CONFIG_FILE

TRACKER, RELEASE, HF = "latest_checkpointed_iteration.txt", "release", "hf"
_METADATA = "metadata.json"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def find_files(folder: Path) -> Path:
    """Return the folder that holds the torch_dist files.

    Args:
        folder: of Megatron-LM's shape, a run's `checkpoints`, or the files' own.

    Raises:
        CheckpointError: nothing of the kind is there, or its pointer points nowhere.
    """
    if (folder / _METADATA).is_file():
        return folder
    for pointer in (TRACKER, LATEST):
        if (folder / pointer).is_file():
            word = (folder / pointer).read_text(encoding="utf-8").strip()
            found = folder / (f"iter_{int(word):07d}" if word.isdigit() else word)
            if (found / _METADATA).is_file():
                return found
            raise CheckpointError(f"{folder / pointer} names {word}, but {found / _METADATA} is missing")
    raise CheckpointError(
        f"{folder}: no Megatron checkpoint: neither {_METADATA}, {TRACKER} nor {LATEST} is there; only the "
        "torch_dist format is read"
    )


def find_config(folder: Path, given: Path | None) -> Path:
    """Return the folder whose config.json says what a Megatron checkpoint holds.

    Args:
        folder: the checkpoint.
        given: what the user says.

    Raises:
        CheckpointError: nobody says it.
    """
    chosen = given or folder / HF
    if not (chosen / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{chosen / CONFIG_FILE}: missing; give --config FOLDER, a Hugging Face folder of the same "
            "model: a Megatron checkpoint does not say what architecture it is"
        )
    return chosen


def copy_companions(source: Path, target: Path) -> None:
    """Copy a Hugging Face folder's files that are no weights: config.json, tokenizer, templates..."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, target / file.name)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuse to replace what stands at a target.

    Raises:
        CheckpointError: it is there and `force` is not given.
    """
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists already; choose another folder, or --force to replace it")
