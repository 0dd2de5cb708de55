"""One line of the replay table, and a reader that knows which keys of a file nobody has asked for.

A golden file counts as replayed only if every key in it was compared, used as an input, or left out by name:
`Golden.rows` therefore ends with a failing row for each key that was never touched, and for each option of a
case that was never read. Nothing here knows what a key means; the replay modules do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

LOSS_TOLERANCE = 1e-6
"""Largest error of a loss or gradient (fp32), relative to the larger of 1 and the value."""
LOGIT_TOLERANCE = 1e-5
"""Largest error of logits and hidden states (fp32), in the same measure."""

Status = Literal["replayed", "differs", "not there", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one key, or of one group of keys, of a golden file."""

    file: str
    """File or folder/file inside the goldens folder."""
    label: str
    """Key or case group."""
    status: Status
    error: float | None = None
    """Largest error found (None where nothing was compared)."""
    note: str = ""
    """Why it differs (the reference bug by name), what is not there, or what failed."""

    @property
    def passed(self) -> bool:
        """Whether this row lets the replay succeed."""
        return self.status != "failed"


def error_of(ours: Tensor, golden: Tensor) -> float:
    """Return max |ours - golden| / max(1, |golden|), elementwise; infinite for unequal shapes and NaN."""
    if ours.shape != golden.shape:
        return float("inf")
    if golden.numel() == 0:
        return 0.0
    ours, golden = ours.detach().double(), golden.double()
    error = ((ours - golden).abs() / golden.abs().clamp_min(1.0)).max().item()
    return float("inf") if math.isnan(error) else error


def judge(file: str, label: str, recorded: Any, ours: Any, bug: str = "") -> Row:
    """Judge plain values (lists, numbers): what we make of an input against what was recorded.

    `bug` names the reference bug that the caller has found at work in what was recorded, while ours is as it
    should be; empty: nothing explains a difference.
    """
    if recorded == ours:
        return Row(file=file, label=label, status="replayed", error=0.0)
    note = bug or "neither ours nor what a named bug makes of ours"
    return Row(file=file, label=label, status="differs" if bug else "failed", note=note)


class Case(dict[str, Any]):
    """The options of one case; notes which of them somebody has read."""

    def __init__(self, options: Mapping[str, Any], read: set[str]) -> None:
        """Take the options; `read` collects their names over all cases of a file."""
        super().__init__(options)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an option, or `default` where the case leaves it out."""
        self._read.add(name)
        return super().get(name, default)


class Golden:
    """One npz file whose keys are ticked off as they are used."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Open `path`; `name` is how the table calls it (default: the file's own name)."""
        self.name = name or path.name
        self._arrays: dict[str, Any] = dict(np.load(path, allow_pickle=False))
        self._untouched = set(self._arrays)
        self._options: set[str] = set()
        self._read_options: set[str] = set()
        self._rows: list[Row] = []

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def keys(self, pattern: str = ".*") -> list[str]:
        """List the keys that match the whole of a regular expression, in the file's order; touches none."""
        return [key for key in self._arrays if re.fullmatch(pattern, key)]

    def read(self, key: str) -> Tensor:
        """Return an array as a tensor and tick it off; a KeyError names a key that is not there."""
        array = self._arrays[key]
        self._untouched.discard(key)
        return torch.from_numpy(np.array(array))

    def cases(self) -> list[Case]:
        """Return the parsed `cases_json` of the file."""
        self._untouched.discard("cases_json")
        cases = [Case(case, self._read_options) for case in json.loads(str(self._arrays["cases_json"]))]
        self._options.update(*cases)
        return cases

    def compare(self, label: str, ours: Mapping[str, Tensor], tolerance: float = LOSS_TOLERANCE) -> None:
        """Add one row for keys with our values: failed if the worst error exceeds `tolerance`."""
        errors = {key: error_of(value, self.read(key)) for key, value in ours.items()}
        if not errors:
            self.add(label, "failed", note="no such key in the file")
            return
        worst = max(errors, key=lambda key: errors[key])
        if errors[worst] <= tolerance:
            self.add(label, "replayed", error=errors[worst])
        else:
            note = f"{worst}: {errors[worst]:.3g} exceeds {tolerance:g}"
            self.add(label, "failed", error=errors[worst], note=note)

    def compare_exactly(self, key: str, ours: Tensor) -> None:
        """Add one row for a key that must be equal: ids, masks, counts."""
        self.compare(key, {key: ours}, tolerance=0.0)

    def compare_logits(self, key: str, ours: Tensor) -> None:
        """Add one row for a key of logits or hidden states."""
        self.compare(key, {key: ours}, LOGIT_TOLERANCE)

    def add(self, label: str, status: Status, *, error: float | None = None, note: str = "") -> None:
        """Add a row whose verdict was reached elsewhere."""
        self._rows.append(Row(file=self.name, label=label, status=status, error=error, note=note))

    def leave_out(self, label: str, keys: Iterable[str], note: str) -> None:
        """Tick off keys whose input is not in this folder, and the options of cases."""
        self._read_options |= self._options
        self._untouched.difference_update(keys)
        self.add(label, "not there", note=note)

    def rows(self) -> list[Row]:
        """Return the rows so far, and one failing row for each key or option that nobody asked for."""
        lost = {key: "unknown key: nothing replays it" for key in sorted(self._untouched)}
        options = sorted(self._options - self._read_options)
        lost |= {f"cases_json: {name}": "unknown option: nothing reads it" for name in options}
        told = [Row(file=self.name, label=key, status="failed", note=note) for key, note in lost.items()]
        return [*self._rows, *told]
