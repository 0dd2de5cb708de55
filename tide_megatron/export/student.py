"""The student that goes out: its folder and what is known about its training, read and checked beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tide_megatron.base.errors import CheckpointError, ConfigError, DataError
from tide_megatron.base.read import json_of, text_of
from tide_megatron.data.manifest import Manifest, read_manifest
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import CONTEXT_FILE, MODEL, RECIPE, model_of, trained_context
from tide_megatron.export.formats import ExportFormat
from tide_megatron.models.arch.qwen3 import Qwen3
from tide_megatron.models.weights import read_architecture
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.folder import RESULT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedStudent:
    """A model folder and its story."""

    folder: Path
    architecture: Qwen3
    tokenizer: Tokenizer
    context: Context | None
    """What it was trained in; None: nobody says."""
    recipe: dict[str, Any] | None
    """The run's resolved recipe; None: no run is known."""
    result: dict[str, Any] | None
    """The run's held-out scores and costs."""
    data: dict[str, Manifest]
    """`train` and `held_out` -> what was learnt from and measured on, where it is still at hand."""

    @property
    def special(self) -> dict[str, int]:
        """Ids of special tokens by role: mask, eos, pad, and bos where there is one."""
        tokenizer = self.tokenizer
        ids = {"mask": tokenizer.mask_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        bos = tokenizer.special_tokens.get("bos_token")
        found = tokenizer.backend.find(bos) if bos else None
        return ids if found is None else {"bos": found, **ids}

    @property
    def block_size(self) -> int | None:
        """Tokens of a block; None where there are no blocks, or nobody says."""
        has_blocks = self.context is not None and self.context.kind != "bidirectional"
        return self.context.block_size if self.context is not None and has_blocks else None


def read_student(path: Path, formats: Sequence[ExportFormat]) -> TrainedStudent:
    """Read a run folder, or a model folder, and refuse what cannot go out in these forms.

    Args:
        path: a run's folder, its `model/`, or any model folder.
        formats: the wanted forms.

    Raises:
        CheckpointError: no weights, or the run has not ended.
        ConfigError: a student of another shape, or no block size for a form that needs one.
        DataError: no tokenizer.
    """
    run, folder = _places(path)
    architecture = read_architecture(folder)
    tokenizer = _read_tokenizer(folder)
    if not isinstance(architecture, Qwen3) or not architecture.qk_norm or architecture.qkv_bias:
        raise ConfigError(
            f"{folder}: config.json: model_type: {architecture.model_type!r} cannot become "
            f"{' or '.join(form.name for form in formats)}: its layers are not Qwen3's; "
            "export a student of model_type a2d-qwen3, qwen3 or sdar"
        )
    if tokenizer.vocabulary_size > architecture.vocabulary:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.vocabulary_size} ids (mask token included), its model "
            f"{architecture.vocabulary} rows; give it the tokenizer that it was trained with"
        )
    recipe = _read_yaml(run / RECIPE) if run else None
    student = TrainedStudent(
        folder=folder,
        architecture=architecture,
        tokenizer=tokenizer,
        context=_read_context(folder, recipe),
        recipe=recipe,
        result=_read_result(run / RESULT) if run else None,
        data=_read_data(recipe),
    )
    for form in formats:
        if form.serves_blocks and student.block_size is None:
            said = f"was trained {student.context.kind}" if student.context else "does not say its context"
            raise ConfigError(
                f"{folder}: {form.name} is served block by block, and this student {said}; choose another "
                f"--format, or if it was trained in blocks write {CONTEXT_FILE} there: "
                '{"kind": "block_diffusion", "block_size": 32}'
            )
    return student


def _places(path: Path) -> tuple[Path | None, Path]:
    """Return the run's folder, if one is known, and the model's."""
    folder = model_of(path)
    if folder != path:
        return path, folder
    parent = path.resolve().parent
    is_ours = path.resolve().name == MODEL and (parent / RECIPE).is_file()
    return (parent if is_ours else None), path


def _read_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.load(folder)
    except DataError as fault:
        raise DataError(
            f"{fault}; an export carries the student's tokenizer: copy it into {folder}"
        ) from None


def _read_context(folder: Path, recipe: dict[str, Any] | None) -> Context | None:
    """Return what the folder says, else what the run's recipe said; None: nobody says."""
    if (folder / CONTEXT_FILE).is_file():
        return trained_context(folder)
    student = (recipe or {}).get("student")
    said = student.get("context") if isinstance(student, dict) else None
    return (
        trained_context(folder, said.get("kind"), said.get("block_size")) if isinstance(said, dict) else None
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text_of(file))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as fault:
        raise CheckpointError(f"{file}: not readable ({fault}); give the run's model/ instead") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: is no recipe; give the run's model/ instead")
    return tree


def _read_result(file: Path) -> dict[str, Any] | None:
    """Return the result; a run that was scored nowhere else has none."""
    if not file.is_file():
        return None
    try:
        result = json_of(file)
        if not isinstance(result, dict):
            raise ValueError(f"it holds a {type(result).__name__}")
    except ValueError as fault:
        raise CheckpointError(
            f"{file}: not readable as JSON ({fault}); remove it to export without"
        ) from None
    return result


def _read_data(recipe: dict[str, Any] | None) -> dict[str, Manifest]:
    """Return the manifests of the data that a recipe names, as far as they are there."""
    named = (recipe or {}).get("data")
    found = {}
    for part in ("train", "held_out"):
        folder = named.get(part) if isinstance(named, dict) else None
        if isinstance(folder, str):
            try:
                found[part] = read_manifest(Path(folder))
            except (DataError, OSError):
                continue  # moved or prepared anew since: the card says that it is not at hand
    return found
