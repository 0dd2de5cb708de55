"""What is evaluated: tasks of this package, tasks of lm-evaluation-harness, and files that name several.

A word of `--tasks` is a task of ours (`TASKS`), a task or group of lm-evaluation-harness (`lm_eval/NAME`, or
NAME where we have none of that name), or a suite: `paper`, or a YAML file with tasks, how each is decoded and
what was published on it. `NAME:FILTER` takes the score of one of a harness's filters.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from pydantic import Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.base.options import STRICT
from tide_megatron.base.settings import validated, yaml_mapping
from tide_megatron.decode.options import Decoding
from tide_megatron.tasks import TASKS

HARNESS = "lm_eval/"
"""Stands before the name of a task of lm-evaluation-harness."""
SUITES = ("paper",)
FOLDER = Path(str(importlib.resources.files("tide_megatron.tasks") / "suites"))
HARNESS_TASKS = FOLDER / "lm_eval"
"""Tasks that we describe in lm-evaluation-harness's own way."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Published:
    """What a paper reports of a task, in percent, under names of its models."""

    questions: int
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Entry:
    """One task of an evaluation."""

    name: str
    """In results and tables."""
    task: str
    """As in `--tasks`; with `lm_eval/` in front of it where it is the harness's."""
    metric: str | None = None
    """The harness's; null: the first that the task names."""
    filter: str | None = None
    """The harness's; null: the first that the task names."""
    shots: int | None = Field(default=None, ge=0)
    """The harness's examples before a question; null: as the task says."""
    decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Decoding` in the place of the task's own."""
    published: Published | None = None
    same_questions: tuple[str, ...] = ()
    """Tasks that ask the same questions in another form."""

    @property
    def is_harness(self) -> bool:
        """Whether lm-evaluation-harness asks and judges."""
        return self.task.startswith(HARNESS)

    @property
    def harness_name(self) -> str:
        """The task's name there."""
        return self.task.removeprefix(HARNESS)

    def decoded(self, default: Decoding, given: Mapping[str, Any]) -> Decoding:
        """Return how it is decoded.

        Args:
            default: the task's own.
            given: fields of `Decoding` that the user asked for; they have the last word.

        Raises:
            ConfigError: a field that is not known, or a value that cannot be; batches that would decide the
                replies.
        """
        own = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
        decoding = validated(Decoding, {**own, **self.decoding, **given}, "decoding.", noun="command")
        if decoding.schedule == "reference" and decoding.batch > 1:
            raise ConfigError(
                f"decoding.batch: {decoding.batch} under decoding.schedule=reference makes replies depend on "
                "which prompts are padded together, and so on ranks and restarts; use decoding.batch=1"
            )
        return decoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks of a suite file."""

    entries: tuple[Entry, ...]
    block_size: int | None = None
    """Of its protocol; a model's own is what it is read in."""


def chosen_entries(words: Sequence[str]) -> Suite:
    """Return what the words of `--tasks` mean; names of the harness's tasks are not looked up yet.

    Raises:
        ConfigError: no words, a task named twice, or a suite file that cannot be.
    """
    entries: list[Entry] = []
    block_size = None
    for word in words:
        if word in SUITES or word.endswith((".yaml", ".yml")):
            suite = read_suite(FOLDER / f"{word}.yaml" if word in SUITES else Path(word))
            entries += suite.entries
            block_size = suite.block_size
            continue
        name, _, choice = word.partition(":")
        task = name if name in TASKS or name.startswith(HARNESS) else f"{HARNESS}{name}"
        if choice and task in TASKS:
            raise ConfigError(f"--tasks: {word!r}: {name} is a task of this package and has no filters")
        entries.append(Entry(name=name.removeprefix(HARNESS), task=task, filter=choice or None))
    names = [entry.name for entry in entries]
    if not names:
        raise ConfigError(f"--tasks: name some; {nearest('', [*TASKS, *SUITES])}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--tasks: {twice[0]!r} is named twice")
    return Suite(entries=tuple(entries), block_size=block_size)


def decoding_words(words: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE, values as in YAML.

    Raises:
        ConfigError: a word without `=`, or a value that is no YAML.
    """
    found = {}
    for word in words:
        key, is_there, value = word.partition("=")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            is_there = ""
        if not is_there:
            raise ConfigError(f"--decoding: {word!r} is no KEY=VALUE; write for example new_tokens=64")
    return found


def read_suite(file: Path) -> Suite:
    """Read a suite file.

    Raises:
        ConfigError: an unknown key or a value that cannot be.
    """
    tree: Any = OmegaConf.to_container(yaml_mapping(file, "suite", "configs/evaluation/"), resolve=True)
    tasks, block_size = tree.pop("tasks", None), tree.pop("block_size", None)
    if tree or not isinstance(tasks, dict) or not isinstance(block_size, int | None):
        wrong = next(iter(tree), "tasks")
        raise ConfigError(f"{file}: {wrong}: a suite has `tasks`, each by its name, and `block_size`")
    return Suite(
        entries=tuple(_entry(file, name, dict(values or {})) for name, values in tasks.items()),
        block_size=block_size,
    )


def _entry(file: Path, name: str, values: dict[str, Any]) -> Entry:
    published = values.pop("published", None)
    if published is not None:
        questions = published.pop("questions", None)
        values["published"] = {"questions": questions, "scores": published}
    return validated(Entry, {"name": name, **values}, f"{file}: tasks.{name}.", noun="file")


def published_of(task: str) -> Published | None:
    """Return what the paper reports of a task or of its questions in another form; None: nothing."""
    for entry in read_suite(FOLDER / "paper.yaml").entries:
        if task in (entry.task, *entry.same_questions):
            return entry.published
    return None
