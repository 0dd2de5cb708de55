"""Which collective this process waits in, as torch's flight recorders have it.

torch notes every collective of gloo and NCCL when it is called, and again when it is done. Stacks say where
a rank stands; this says with whom, of what shape and as which call of the group: two ranks that are at
different numbers of one group have parted before. NCCL has a recorder of its own, the other one has the rest.

NCCL's asks the GPU which of its calls have begun, and a GPU that hangs may never answer. So a recorder is
asked in a thread of its own, and not waited for longer than a limit: whoever asks has a rank to end.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import Any

from torch._C import _distributed_c10d as recorder

ANSWER_SECONDS = 10.0
"""So long may a recorder take to answer."""
_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""torch's names for what they give out; the first is there where torch has NCCL."""


def pending_collective() -> str:
    """Return the collectives that were called first and are not done; empty: none, or nothing is recorded.

    The record is torch's own affair. One in another form, or one that does not come, is told as such and
    keeps nobody: a rank that stands still has to be ended whether or not it is known with whom it waits.
    """
    dumps = [getattr(recorder, name) for name in _DUMPS if hasattr(recorder, name)]
    return ", and ".join(filter(None, (_answer(dump) for dump in dumps)))


def _answer(dump: Callable[[], str]) -> str:
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    # A daemon, for one that is stuck must not keep the process.
    threading.Thread(target=lambda: answers.put(_pending(dump)), name="flight-recorder", daemon=True).start()
    try:
        return answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        return f"what torch's flight recorder did not tell within {ANSWER_SECONDS:g} s"


def _pending(dump: Callable[[], str]) -> str:
    try:
        entries = json.loads(dump()).get("entries", [])
        pending = [entry for entry in entries if not entry.get("retired", True)]
        return _told(min(pending, key=lambda entry: int(entry["record_id"]))) if pending else ""
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as fault:
        return f"what torch's flight recorder has in a form that is not known here ({fault!r})"


def _told(entry: dict[str, Any]) -> str:
    shapes = ", ".join(str(shape) for shape in entry.get("input_sizes", [])) or "nothing"
    number = entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id")
    return f"{entry['profiling_name']} of {shapes}, call {number} of group {entry['process_group'][0]}"
