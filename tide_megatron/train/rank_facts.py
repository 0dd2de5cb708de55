"""What each rank says of itself before the first step, for `train/preflight.py` to compare.

Cheap things every rank says itself. What has to be read (sources of this package, data, models) is read once
for each copy that there is: a folder of the same device and inode on the same machine is one copy, so of the
ranks of a machine one reads it, another reads the next one, and all say what was found. Another machine reads
its own, also of a file system that both see. Sources, tokenizers and manifests are read whole, weights and
columns are sampled (`base.file_samples`): 1 MB of each file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tide_megatron.platform import prepare_platform

import numpy
import torch

import tide_megatron
from tide_megatron.base.device import Device, read_job
from tide_megatron.base.disk import free_disk_bytes
from tide_megatron.base.errors import TideError
from tide_megatron.base.file_samples import take_in
from tide_megatron.base.options import without_places
from tide_megatron.base.owner import Holder
from tide_megatron.base.transformer_engine import find_transformer_engine
from tide_megatron.data.manifest import MANIFEST_FILE, read_manifest
from tide_megatron.models.fingerprint import fingerprint
from tide_megatron.parallel.collectives import fail_together, gather_objects, own_share
from tide_megatron.text.backends import BACKENDS
from tide_megatron.text.backends.files import CONFIG_FILE
from tide_megatron.text.special_tokens import MAP_FILE
from tide_megatron.text.templates import TEMPLATE_FILE, TEMPLATE_FOLDER
from tide_megatron.train.recipe import Model, Recipe
from tide_megatron.train.resolve import Tree

CODE = "code"
UNREADABLE = "cannot be read"
"""Begins what is said of a folder that is not there."""
_TEXTS = (*BACKENDS, CONFIG_FILE, MAP_FILE, TEMPLATE_FILE, f"{TEMPLATE_FOLDER}/*.jinja")
"""Files of a model folder that make its tokenizer."""
Files = dict[str, str]
"""File -> digest."""
Contents = dict[str, Files]
"""What was read -> its files."""
_SOURCES = (".py", ".jinja")
_DIGITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One rank's."""

    host: str
    machine: str
    """Equal on ranks of one machine (and of one container)."""
    device: str
    versions: Mapping[str, str]
    recipe: str
    """Digest of the resolved recipe without its paths, machine choices included, and of how it is started."""
    free_bytes: int | None
    """On the disk of the run folder; None: nobody can tell."""
    copies: Mapping[str, str]
    """What is to be read -> which copy of it this rank has."""


def facts_here(recipe: Recipe, tree: Tree, device: Device, *, resume: bool) -> RankFacts:
    """Return what this rank knows at once. Not a collective.

    Args:
        recipe: validated.
        tree: its resolved values.
        device: where this rank computes.
        resume: whether the start goes on from the run folder.
    """
    here = Holder.here(read_job())
    machine = here.machine or here.host
    return RankFacts(
        host=here.host,
        machine=machine,
        device=device.described,
        versions=versions(device),
        recipe=_digest(json.dumps(comparable(tree, resume=resume), sort_keys=True).encode()),
        free_bytes=free_bytes(Path(recipe.folder)),
        copies={key: _copy(folder, machine) for key, folder in folders(recipe).items()},
    )


def comparable(tree: Tree, *, resume: bool) -> Tree:
    """Return what all ranks must have alike of a recipe; paths may differ, what lies there is compared."""
    return {**without_places(tree, Recipe), "--resume": resume}


def versions(device: Device) -> dict[str, str]:
    """Return the versions that decide what is computed, by name."""
    engine = find_transformer_engine()
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": prepare_platform().megatron_version,
        "numpy": numpy.__version__,
        "Transformer Engine": engine.version if engine.is_usable else "none",
    }
    if device.type == "cuda":
        found |= {"CUDA": str(torch.version.cuda), "NCCL": _nccl()}
    return found


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def free_bytes(folder: Path) -> int | None:
    """Return what a folder's disk has room for; None: nobody can tell."""
    try:
        return free_disk_bytes(folder)
    except OSError:
        return None


def folders(recipe: Recipe) -> dict[str, Path]:
    """Return what is to be read, by the key that the recipe has for it."""
    held_out = {} if recipe.data.held_out is None else {"data.held_out": Path(recipe.data.held_out)}
    return {
        CODE: Path(tide_megatron.__file__).parent,
        **{key: Path(folder) for key, folder in recipe.data.folders.items()},
        **held_out,
        **{key: Path(model.folder) for key, model in _models(recipe).items()},
    }


def _models(recipe: Recipe) -> dict[str, Model]:
    """Return the models by the key of their folder."""
    teachers = {f"teachers.{name}.folder": model for name, model in recipe.teachers.items()}
    return {"student.folder": recipe.student, **teachers}


def contents(recipe: Recipe, facts: Sequence[RankFacts]) -> tuple[list[dict[str, str]], list[Contents]]:
    """Return, of every rank, a digest of each copy that it has. All ranks call it together.

    Args:
        recipe: the same on all ranks, apart from paths.
        facts: of all ranks.

    Returns:
        Key -> digest, or `UNREADABLE` with the reason; and, of copies of which there are different ones, the
        digests of their files. Both the same on every rank.
    """
    own = own_share()[0]
    readers, readings = _readers(facts), _readings(recipe)
    with fail_together():
        mine = [key for key, copies in readers.items() if own in copies.values()]
        read = {key: _tried(readings[key]) for key in mine}
    told = gather_objects({key: _in_short(files) for key, files in read.items()})
    found = [{key: told[readers[key][copy]][key] for key, copy in one.copies.items()} for one in facts]
    unlike = {key for key in readers if len({one[key] for one in found}) > 1}
    if not unlike:
        return found, [{} for _ in facts]
    by_reader = gather_objects({key: files for key, files in read.items() if key in unlike})
    files = [{key: by_reader[readers[key][one.copies[key]]][key] for key in unlike} for one in facts]
    return found, [{key: one for key, one in by_key.items() if isinstance(one, dict)} for by_key in files]


def _in_short(files: Files | str) -> str:
    """Return one digest of all files, or the reason why there is none."""
    return files if isinstance(files, str) else _digest(json.dumps(files, sort_keys=True).encode())


def _readers(facts: Sequence[RankFacts]) -> dict[str, dict[str, int]]:
    """Choose which rank reads each copy: key -> copy -> rank. Ranks of a machine take turns."""
    found: dict[str, dict[str, int]] = {}
    for number, key in enumerate(facts[0].copies):
        holders: defaultdict[str, list[int]] = defaultdict(list)
        for rank, one in enumerate(facts):
            holders[one.copies[key]].append(rank)
        found[key] = {copy: ranks[number % len(ranks)] for copy, ranks in holders.items()}
    return found


def _readings(recipe: Recipe) -> dict[str, Callable[[], Files]]:
    """Return how each is read; each may raise a TideError or an OSError."""
    models = _models(recipe)
    found: dict[str, Callable[[], Files]] = {}
    for key, folder in folders(recipe).items():
        if key == CODE:
            found[key] = functools.partial(files_of_code, folder)
        elif key in models:
            has_weights = models[key].initial == "folder"
            found[key] = functools.partial(files_of_model, folder, weights=has_weights)
        else:
            found[key] = functools.partial(files_of_data, folder)
    return found


def _tried(read: Callable[[], Files]) -> Files | str:
    """Return what is read, or why it cannot be."""
    try:
        return read()
    except (TideError, OSError) as fault:
        return f"{UNREADABLE} ({fault})"


@functools.cache
def files_of_code(package: Path) -> Files:
    """Digest the files of a package that Python reads."""
    files = (path for path in package.rglob("*") if path.suffix in _SOURCES and path.is_file())
    return {str(path.relative_to(package)): _digest(path.read_bytes()) for path in files}


def files_of_data(folder: Path) -> Files:
    """Digest a data folder: its manifest, and samples of its columns."""
    manifest = read_manifest(folder)
    return {MANIFEST_FILE: manifest.digest, **{name: _sampled(folder / name) for name in manifest.files}}


def files_of_model(folder: Path, *, weights: bool) -> Files:
    """Digest a model folder: config.json, tokenizer and template, and samples of its weights.

    Args:
        folder: of the model.
        weights: False: they are drawn from the seed.
    """
    texts = (path for pattern in _TEXTS for path in folder.glob(pattern))
    return {
        "config.json": fingerprint(folder, weights=False),
        **{path.name: _digest(path.read_bytes()) for path in texts},
        **{path.name: _sampled(path) for path in folder.glob("*.safetensors") if weights},
    }


def _sampled(file: Path) -> str:
    found = hashlib.sha256()
    take_in(file, found)
    return found.hexdigest()[:_DIGITS]


def _copy(folder: Path, machine: str) -> str:
    """Say which copy a folder is: equal words, equal files."""
    try:
        status = os.stat(folder)
    except OSError:
        return f"{machine} missing"
    return f"{machine} {status.st_dev}:{status.st_ino}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]
