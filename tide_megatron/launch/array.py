"""Which part of the work a task of SLURM has: of a job array, or of one step of several tasks."""

from __future__ import annotations

import os

from tide_megatron.base.errors import ConfigError

WORD = "slurm"
_ARRAY = "SLURM_ARRAY_TASK_"


def read_part(word: str) -> str:
    """Return K/N, from 1/N to N/N, of a task.

    Args:
        word: K/N, which is returned as it is; or `slurm`: SLURM says it.

    Raises:
        ConfigError: `slurm` outside of an array and of a step; an array that has gaps, as when only some of
            its tasks are started again.
    """
    if word != WORD:
        return word
    if f"{_ARRAY}ID" not in os.environ:
        if {"SLURM_PROCID", "SLURM_NTASKS"} <= os.environ.keys():
            return f"{_number('SLURM_PROCID') + 1}/{_number('SLURM_NTASKS')}"
        raise ConfigError("part: slurm: this is no task of a job array and none of srun; write K/N")
    task, first, last = (_number(f"{_ARRAY}{name}") for name in ("ID", "MIN", "MAX"))
    count, step = _number(f"{_ARRAY}COUNT"), _number(f"{_ARRAY}STEP") if f"{_ARRAY}STEP" in os.environ else 1
    if (task - first) % step or (last - first) // step + 1 != count:
        raise ConfigError(
            f"part: slurm: the array has {count} tasks from {first} to {last}, so it has gaps; to start some "
            "tasks again say which parts of how many: --part $SLURM_ARRAY_TASK_ID/N"
        )
    return f"{(task - first) // step + 1}/{count}"


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise ConfigError(f"part: slurm: {name} is {os.environ.get(name)!r}, which is no number") from None
