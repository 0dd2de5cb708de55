"""From YAML to a `Recipe`: fragments, overrides, validation, digest.

Precedence: dataclass default < included fragments in their order < run file < `key=value` of the command
line, from left to right. Fragments are named under `include:` relative to the file that names them,
and include nothing themselves. At each of these steps a value replaces what was there, a section is merged
key by key, an empty one (`teachers={}`) empties, and null takes a teacher or a term away
(`losses.kl=null`); elsewhere null is a value like others.

OmegaConf merges; pydantic validates; this module turns both libraries' complaints into one `ConfigError` that
names the key, the value and the nearest legal choice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter

from tide_megatron.base.errors import ConfigError, DataError, nearest, under
from tide_megatron.base.files import local_path
from tide_megatron.base.options import options_of, without_machine
from tide_megatron.base.settings import told, validated, yaml_mapping
from tide_megatron.data.blend import BlendedData
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.manifest import read_manifest
from tide_megatron.losses import LOSSES
from tide_megatron.train.recipe import Data, Recipe

Tree = dict[str, Any]
_NAMED = frozenset(
    f"{section}{option.name}"
    for section, kind in (("", Recipe), ("data.", Data))
    for option in options_of(kind)
    if option.is_named
)
"""Sections whose entries have names that the recipe gives."""


def load_recipe(file: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Tree]:
    """Read a run file, merge its fragments and the overrides, and validate the result.

    Args:
        file: YAML run file.
        overrides: `key=value` strings, dotted keys; each goes over what is left of it.

    Returns:
        The recipe and its resolved tree of plain values (what is printed, hashed and saved).

    Raises:
        ConfigError: naming file, key, value and remedy.
    """
    tree = OmegaConf.create({})
    try:
        for fragment in (*_fragments(file), *_overrides(overrides)):
            _clear(tree, fragment)
            tree = OmegaConf.merge(tree, fragment)
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError) as fault:  # TypeError: a list merged with a mapping
        raise ConfigError(f"{file}: {told(fault)}; fix it there, or in the overrides") from None
    assert isinstance(plain, dict), "a merge of mappings is a mapping"
    return build_recipe({str(key): value for key, value in plain.items()})


def build_recipe(tree: Tree) -> tuple[Recipe, Tree]:
    """Validate a tree of plain values; return the recipe and the tree with every default filled in."""
    is_by_epochs = tree.get("epochs") is not None
    is_open = is_by_epochs and tree.get("steps") is None
    recipe: Recipe = validated(Recipe, {**tree, "steps": 1} if is_open else tree, prefix="")
    if is_by_epochs:
        recipe = _with_steps(recipe, is_open=is_open)
    if not recipe.losses:
        raise ConfigError("losses: name at least one term, for example {ce: {kind: cross_entropy}}")
    built = {name: _build_loss(name, options) for name, options in recipe.losses.items()}
    recipe = dataclasses.replace(recipe, losses=built)
    _check_listeners(recipe)
    return recipe, resolved_tree(recipe)


def resolved_tree(recipe: Recipe) -> Tree:
    """Return the recipe as plain values, with every default written out."""
    tree: Tree = json.loads(TypeAdapter(Recipe).dump_json(recipe, warnings=False))
    kinds = {cls: kind for kind, cls in LOSSES.items()}
    tree["losses"] = {
        name: {"kind": kinds[type(loss)], **json.loads(TypeAdapter(type(loss)).dump_json(loss))}
        for name, loss in recipe.terms.items()
    }
    return tree


def digest(tree: Tree) -> str:
    """Hash the mathematics of a resolved tree."""
    return hashlib.sha256(json.dumps(mathematics(tree), sort_keys=True).encode()).hexdigest()[:16]


def mathematics(tree: Tree) -> Tree:
    """Return a resolved tree without its machine choices (layouts, run folder, reports, device)."""
    return without_machine(tree, Recipe)


def difference(old: Tree, new: Tree, prefix: str = "") -> list[str]:
    """List the keys in which two trees differ, as `key: old -> new`."""
    lines = []
    for key in sorted({*old, *new}):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            lines += difference(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return lines


def _clear(below: Any, above: Any, prefix: str = "") -> None:
    """Take out of one tree what the tree to be merged over it empties or removes.

    Args:
        below: what was merged so far; changed.
        above: what comes over it; what it removes goes from it, too.
        prefix: dotted key of both, with a dot behind.

    Raises:
        ConfigError: there is nothing of that name to remove.
    """
    for key in list(above):
        if OmegaConf.is_interpolation(above, key) or OmegaConf.is_missing(above, key):
            continue
        value = above[key]
        if value is None and f"{prefix}{key}" in _NAMED:
            above[key] = value = OmegaConf.create({})
        if value is None and prefix.rstrip(".") in _NAMED:
            if key not in below:
                known = nearest(str(key), map(str, below)) if below else "there are none"
                raise ConfigError(f"{prefix}{key}: null removes it, but it is not there; {known}")
            del below[key], above[key]
        elif isinstance(value, DictConfig) and key in below:
            if not value:
                below[key] = {}
            elif not OmegaConf.is_interpolation(below, key) and isinstance(below[key], DictConfig):
                _clear(below[key], value, f"{prefix}{key}.")


def _fragments(file: Path) -> list[Any]:
    """Return the included fragments' trees and then the file's own, ready to merge."""
    own = _recipe_file(file)
    names = own.pop("include", [])
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise ConfigError(f"{file}: include must be a list of YAML files, not {names!r}")
    trees = []
    for name in names:
        place = file.parent / local_path(str(name))
        fragment = _recipe_file(place)
        if "include" in fragment:
            raise ConfigError(f"{place}: a fragment cannot include another; list both in {file}")
        trees.append(fragment)
    return [*trees, own]


def _recipe_file(file: Path) -> DictConfig:
    return yaml_mapping(file, "recipe", "examples are under configs/runs/")


def _overrides(pairs: Sequence[str]) -> Iterator[Any]:
    """Turn `key=value` strings into trees, one after the other."""
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"override {pair!r}: write key=value, for example optimizer.learning_rate=1e-4, or "
                "losses.NAME=null to remove a term"
            )
        if key.strip() == "include":
            raise ConfigError(f"override {pair!r}: fragments are listed in a run file; write include: there")
        try:
            tree = OmegaConf.from_dotlist([pair])
            is_cut = " #" in value and "#" not in str(OmegaConf.to_container(tree))
        except (OmegaConfBaseException, yaml.YAMLError) as fault:
            raise ConfigError(f"override {pair!r}: {told(fault)}; fix or quote the value") from None
        if is_cut:
            raise ConfigError(
                f"override {pair!r}: ' #' begins a comment, what follows would be lost; quote the value"
            )
        yield tree


def _with_steps(recipe: Recipe, *, is_open: bool) -> Recipe:
    """Return the recipe with as many steps as its epochs take, rounded up.

    Args:
        recipe: with `epochs`.
        is_open: it has no `steps`; else they must be the same.

    Raises:
        ConfigError: they are others.
        DataError: the training data cannot be read.
    """
    try:
        samples = _epoch_samples(recipe)
    except DataError as fault:
        raise DataError(f"epochs: {recipe.epochs} need the training data, or give steps: {fault}") from None
    steps = math.ceil(round((recipe.epochs or 0) * samples / recipe.batch.samples, 6))
    if not is_open and recipe.steps != steps:
        raise ConfigError(
            f"steps: {recipe.steps}, but epochs: {recipe.epochs} of {samples} samples are {steps} steps; "
            "give one of the two (steps=null or epochs=null takes the other away)"
        )
    return dataclasses.replace(recipe, steps=steps)


def _epoch_samples(recipe: Recipe) -> int:
    """Return how many samples an epoch has."""
    if recipe.data.train is not None:
        return read_manifest(Path(recipe.data.train)).samples
    opened = {
        name: (source, PreparedData(Path(source.folder), compare_digests=False))
        for name, source in recipe.data.blend.items()
    }
    with under("data.blend"):
        samples = BlendedData(opened, recipe.seed).epoch_samples()
    if samples is None:
        raise ConfigError("epochs: the weights of data.blend do not say how long one is: give steps")
    return samples


def _build_loss(name: str, options: Any) -> Any:
    """Construct the loss object that a term's options describe."""
    if not isinstance(options, dict) or "kind" not in options:
        raise ConfigError(f"losses.{name}: needs a kind; {nearest(name, LOSSES)}")
    kind = options["kind"]
    if not isinstance(kind, str) or kind not in LOSSES:
        raise ConfigError(f"losses.{name}.kind: {kind!r} is unknown; {nearest(str(kind), LOSSES)}")
    rest = {key: value for key, value in options.items() if key != "kind"}
    return validated(LOSSES[kind], rest, prefix=f"losses.{name}.")


def _check_listeners(recipe: Recipe) -> None:
    """Refuse a loss whose teacher is not in the recipe, and a teacher nobody listens to."""
    wanted = {name: loss.teacher for name, loss in recipe.losses.items() if loss.teacher}
    for name, teacher in wanted.items():
        if teacher not in recipe.teachers:
            known = nearest(teacher, recipe.teachers) if recipe.teachers else "the recipe has no teachers"
            raise ConfigError(f"losses.{name}.teacher: {teacher!r} is not under teachers; {known}")
    for teacher in recipe.teachers:
        if teacher not in wanted.values():
            raise ConfigError(
                f"teachers.{teacher}: no loss listens to it; remove it or add a loss with teacher: {teacher}"
            )
