"""Every start of a run and how it ended: `starts.jsonl` in the run folder, one line for each of both.

The first rank adds a line when training begins and one when it ends. Whoever started the ranks adds the end
that the first rank could not tell of (it was killed, or another rank failed first). A start without an end
was killed together with whoever watched it, or its machine was lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tide_megatron.base.clock import Clock
from tide_megatron.base.device import read_job
from tide_megatron.base.lease import LEASE, holder_of
from tide_megatron.base.owner import Holder
from tide_megatron.base.read import text_of
from tide_megatron.base.units import now
from tide_megatron.checkpoint.retention import Mark, listed
from tide_megatron.train.folder import CHECKPOINTS, STARTS

_LONGEST = 500
"""Characters of a reason: the first error, not its traceback."""

End = Literal["finished", "stopped", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run, with its end where one was told."""

    at: str
    """When training began, ISO 8601 with the zone."""
    step: int
    """Where it went on from."""
    lost: int | None = None
    """Updates of the start before that were not saved; None: nobody knows, or there was none."""
    ranks: int = 1
    host: str = ""
    job: str = ""
    """SLURM's number; empty outside of it."""
    restarts: int = 0
    """How often SLURM had restarted the job."""
    ended_at: str = ""
    end: End | None = None
    """How it ended; None: it goes on, or ended without a word."""
    why: str = ""
    last_step: int | None = None
    """The last applied update that its end told."""
    startup_seconds: float | None = None
    """From the command to the end of its first update; None: it came to none."""
    startup: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    """Part of that -> longest seconds of any rank, and the rank (`train.startup`)."""
    lost_on: str = ""
    """The host of a rank that was lost."""
    is_seen: bool = False
    """Whoever started the ranks told the end."""


def note_start(folder: Path, clock: Clock, lost: int | None, ranks: int) -> None:
    """Add a start (only the first rank calls it)."""
    here = Holder.here(read_job())
    line = {"at": now(), "step": clock.step, "lost": lost, "ranks": ranks}
    _add(folder, line | {"host": here.host, "job": here.job, "restarts": here.restarts})


def note_startup(folder: Path, seconds: float, parts: Mapping[str, tuple[float, int]]) -> None:
    """Add to the last start how long it took (only the first rank calls it)."""
    rounded = {name: (round(longest, 3), rank) for name, (longest, rank) in parts.items()}
    _add(folder, {"startup_seconds": round(seconds, 3), "startup": rounded})


def note_end(folder: Path, end: End, why: str = "", step: int | None = None) -> None:
    """Add how the last start ended, unless that is known (only the first rank calls it)."""
    starts = read_history(folder)
    if starts and starts[-1].end is None:
        _add(folder, {"ended_at": now(), "end": end, "why": _short(why), "last_step": step})


def note_failure(folder: Path, why: str, lost_on: str = "") -> None:
    """Add why ranks failed, as whoever started them knows it. Not a collective.

    It goes before what the first rank said, which may only have lost its peers. A start that was refused
    because another one trains says nothing of that one.

    Args:
        folder: of the run.
        why: what is known.
        lost_on: the host of a rank that was lost.
    """
    with contextlib.suppress(OSError):
        starts = read_history(folder)
        if not starts or holder_of(folder / LEASE) is not None:
            return
        is_news = _short(why) not in starts[-1].why and not starts[-1].is_seen
        if starts[-1].end is None or (starts[-1].end == "failed" and is_news):
            line = {"ended_at": now(), "end": "failed", "why": _short(why), "lost_on": lost_on}
            _add(folder, line | {"is_seen": True})


def has_saved(folder: Path) -> bool:
    """Say whether the last start left a checkpoint of a later step than it began at."""
    starts, saved = read_history(folder), listed(folder / CHECKPOINTS)
    return bool(starts and saved) and Mark.of(saved[-1]).step > starts[-1].step


@contextlib.contextmanager
def noting_faults(folder: Path | None) -> Iterator[None]:
    """Note the fault that ends the block; None: another rank does."""
    try:
        yield
    except BaseException as fault:
        if folder is not None:
            with contextlib.suppress(OSError):
                note_end(
                    folder, "stopped" if isinstance(fault, KeyboardInterrupt) else "failed", _words(fault)
                )
        raise


def read_history(folder: Path) -> list[Start]:
    """Return the starts of a run, oldest first; lines that are none are left out."""
    found: list[dict[str, Any]] = []
    try:
        lines = text_of(folder / STARTS).splitlines()
    except (OSError, ValueError):
        return []
    names = {field.name for field in dataclasses.fields(Start)}
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(line)
            if not isinstance(said, dict):
                continue
            said = {name: value for name, value in said.items() if name in names}
            if "at" in said and "step" in said:
                found.append(said)
            elif found and ("end" in said or "startup" in said):
                found[-1] |= said
    return [Start(**said) for said in found]


def _short(why: str) -> str:
    words = " ".join(why.split())
    return words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"


def _words(fault: BaseException) -> str:
    said = str(fault).strip()
    return f"{type(fault).__name__}: {said}" if said else type(fault).__name__


def _add(folder: Path, line: dict[str, Any]) -> None:
    """Append a line in one write."""
    handle = os.open(folder / STARTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    finally:
        os.close(handle)
