"""Which collective this process waits in, as torch's flight recorder has it.

torch notes every collective of gloo and NCCL when it is called, and again when it is done. Stacks say where
a rank stands; this says with whom, of what shape and as which call of the group: two ranks that are at
different numbers of one group have parted before.
"""

from __future__ import annotations

import json
from typing import Any

from torch._C import _distributed_c10d as recorder

_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""torch's names for it, the newer one first."""


def pending_collective() -> str:
    """Return the collective that was called first and is not done; empty: none, or nothing is recorded.

    The record is torch's own affair. One in another form is told as such, and ends nobody who asks: a rank
    that stands still has to be ended whether or not it is known with whom it waits.
    """
    dump = next((getattr(recorder, name) for name in _DUMPS if hasattr(recorder, name)), None)
    try:
        entries = json.loads(dump()).get("entries", []) if dump else []
        pending = [entry for entry in entries if not entry.get("retired", True)]
        return _told(min(pending, key=lambda entry: int(entry["record_id"]))) if pending else ""
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as fault:
        return f"what torch's flight recorder has in a form that is not known here ({fault!r})"


def _told(entry: dict[str, Any]) -> str:
    shapes = ", ".join(str(shape) for shape in entry.get("input_sizes", [])) or "nothing"
    number = entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id")
    return f"{entry['profiling_name']} of {shapes}, call {number} of group {entry['process_group'][0]}"
