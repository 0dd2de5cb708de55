"""Find and load tasks of lm-evaluation-harness, in words for users where they are not to be had.

The harness's own index of 14,000 tasks takes seconds, so it is made only when a name is neither among our
descriptions nor in the folder that the user gives. Data that are not on this machine are looked for once over
the network; after the first refusal the other tasks are looked for in the cache alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from tide_megatron.base.errors import ConfigError, DataError, last_line, nearest
from tide_megatron.tasks.suite import HARNESS_TASKS, Entry

log = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"'([\w.-]+/[\w.-]+)'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task or group of the harness, loaded, with its data."""

    entry: Entry
    loaded: Any
    """Its `Task` or `Group`."""
    manager: Any
    """The index that it came from."""
    metric: str
    filter: str

    @property
    def leaves(self) -> dict[str, Any]:
        """Its tasks by name: of a group all below it."""
        return dict(self.manager.load([self.loaded])["tasks"])


def load_harness_tasks(
    entries: Sequence[Entry], include: Path | None, unsandboxed: Sequence[str]
) -> list[HarnessTask]:
    """Load tasks with their data.

    Args:
        entries: of the harness.
        include: folder of descriptions in the harness's own form; None: none.
        unsandboxed: names of tasks whose generated code may run in this process.

    Raises:
        ConfigError: an unknown task, metric or filter; or a task that runs generated code without being named
            for that.
        DataError: data or packages that are not here: says which, of all tasks.
    """
    manager = _manager([entry.harness_name for entry in entries], include)
    found, missing = [], []
    with contextlib.ExitStack() as stack:
        for entry in entries:
            name = entry.harness_name
            log.info("task %s: loading its data", name)
            try:
                [loaded] = _load(manager, name)
            except ModuleNotFoundError as fault:
                missing.append(f"task {name}: needs a package that is not installed ({last_line(fault)})")
            except OSError as fault:
                stack.enter_context(_without_network())
                missing.append(_missing_data(name, fault))
            else:
                found.append(_chosen(entry, loaded, manager, unsandboxed))
    if missing:
        raise DataError("\n".join(missing))
    return found


def _load(manager: Any, name: str) -> list[Any]:
    """Return a name's task or group; a tag's tasks become one group."""
    built = manager._load_spec(name)
    if not isinstance(built, list):
        return [built]
    raise ConfigError(
        f"--tasks: {name!r} is a tag of {len(built)} tasks in lm-evaluation-harness; name some of them: "
        + ", ".join(task.task_name for task in built[:5])
    )


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """Return an index that has all names.

    Raises:
        ConfigError: a name that nobody has, with the nearest one.
    """
    folders = [str(HARNESS_TASKS), *([str(include)] if include else [])]
    own = TaskManager(include_path=folders, include_defaults=False)
    if all(name in own.task_index for name in names):
        return own
    log.info("reading lm-evaluation-harness's index of tasks")
    manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.task_index:
            from tide_megatron.tasks import TASKS

            raise ConfigError(
                f"--tasks: {name!r} is no task of this package or of lm-evaluation-harness; "
                f"{_nearest(name, [*TASKS, *manager.all_tasks])}"
            )
    return manager


def _nearest(name: str, names: Sequence[str]) -> str:
    """Return a hint that does not list thousands of names."""
    hint = nearest(name, names)
    return hint if hint.startswith("did you") else "`lm_eval ls tasks` lists them"


def _missing_data(name: str, fault: OSError) -> str:
    """Say in one sentence what to download."""
    repository = _REPOSITORY.search(str(fault))
    what = f"data set {repository[1]!r} of the Hugging Face hub" if repository else f"what {name} reads"
    return (
        f"task {name}: its data are not on this machine and cannot be fetched ({last_line(fault)}): download "
        f"{what} where there is a network (this command with --limit 1 does) and bring HF_HOME here, or "
        "leave the task out"
    )


@contextlib.contextmanager
def _without_network() -> Iterator[None]:
    """Look for data in the cache alone; both libraries read their switch when they are asked."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _chosen(entry: Entry, loaded: Any, manager: Any, unsandboxed: Sequence[str]) -> HarnessTask:
    """Choose metric and filter of a loaded task, and refuse one that would run code unasked.

    Raises:
        ConfigError: unknown, or unasked.
    """
    leaves = loaded.get_all_tasks() if isinstance(loaded, Group) else [loaded]
    name = entry.harness_name
    if any(getattr(task, "UNSAFE_CODE", False) for task in leaves) and name not in unsandboxed:
        raise ConfigError(
            f"task {name}: lm-evaluation-harness runs the code that the model writes in this very process, "
            f"without the sandbox; allow that by --unsandboxed {name}, or leave the task out"
        )
    metrics, filters = _metrics(leaves[0]), _filters(leaves[0])
    for word, choices, kind in ((entry.metric, metrics, "metric"), (entry.filter, filters, "filter")):
        if word is not None and word not in choices:
            raise ConfigError(f"--tasks: {name} has no {kind} {word!r}; {nearest(word, choices)}")
    return HarnessTask(
        entry=entry,
        loaded=loaded,
        manager=manager,
        metric=entry.metric or metrics[0],
        filter=entry.filter or filters[0],
    )


def _metrics(task: Any) -> list[str]:
    named = [one["metric"] for one in task.config.metric_list or ()]
    return [one if isinstance(one, str) else one.__name__ for one in named]


def _filters(task: Any) -> list[str]:
    return [one["name"] for one in task.config.filter_list or ()] or ["none"]
