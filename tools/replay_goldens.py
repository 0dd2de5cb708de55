"""Replay a folder of golden vectors against our code and say, key by key, what agrees.

    python tools/replay_goldens.py [DIR]

DIR is tests/golden/data unless another one is named. One row per key or case group: `replayed` with its
largest error, `differs` with the reference bug it is named after,
`not there` for what the folder leaves out, `failed` for all else: a number out of tolerance (losses and
gradients 1e-6, logits 1e-5), a missing key, a file, key or option that nothing replays. The exit code is 0
only if something was replayed and nothing failed. All shapes, temperatures and steps come from the folder.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Callable
from pathlib import Path

import rich.box
import rich.console
import rich.table
import torch

from goldens.batches import replay_collate_cross, replay_collate_shared
from goldens.formulas import replay_calm, replay_masks, replay_schedules, replay_tidal
from goldens.models import replay_models
from goldens.row import Row
from goldens.sampler import replay_sampler
from goldens.steps import replay_aligned_steps, replay_cross_steps, replay_plain_steps, replay_shared_steps
from goldens.texts import (
    replay_alignments,
    replay_find_text,
    replay_map_cross,
    replay_map_shared,
    replay_tokenizers,
)

DATA = Path(__file__).parents[1] / "tests" / "golden" / "data"
REPLAYS: dict[str, Callable[[Path], list[Row]]] = {
    "alpha.npz": replay_schedules,
    "bd3lm_mask.npz": replay_masks,
    "sampler.npz": replay_sampler,
    "taid.npz": replay_tidal,
    "alm.npz": replay_calm,
    "step_bd3lm.npz": replay_plain_steps,
    "step_shared.npz": replay_shared_steps,
    "step_cross.npz": replay_cross_steps,
    "step_aligned.npz": replay_aligned_steps,
    "tokenizers": replay_tokenizers,
    "tokenkit_align.json": replay_alignments,
    "map_cross.json": replay_map_cross,
    "map_shared.json": replay_map_shared,
    "find_text.json": replay_find_text,
    "collate_cross.npz": replay_collate_cross,
    "collate_shared.npz": replay_collate_shared,
    "student_a2d_qwen3": replay_models,
    "teacher_llada2_moe": replay_models,
    "teacher_llada2_moe_g4": replay_models,
    "teacher_wedlm_like": replay_models,
    "teacher_llada": replay_models,
    "teacher_llada_moe": replay_models,
    "teacher_dream": replay_models,
}
DOCUMENTS = {"README.md", "replay_check.py"}


def replay(folder: Path) -> list[Row]:
    """Replay every file of a goldens folder; an exception inside a replay is a failing row of that file."""
    rows = []
    present = {path.name for path in folder.iterdir() if not path.name.startswith((".", "__pycache__"))}
    for name, replay_file in REPLAYS.items():
        try:
            if name not in present:
                raise FileNotFoundError(name)
            rows += replay_file(folder / name)
        except FileNotFoundError as absent:  # the file itself, or one that it is read with
            missing = Path(absent.filename or str(absent))
            note = f"this folder has no {missing.relative_to(folder) if missing.is_absolute() else missing}"
            rows.append(Row(file=name, label="", status="not there", note=note))
        except Exception as fault:  # whatever a broken file raises belongs in the table
            note = f"{type(fault).__name__}: {fault}"
            rows.append(Row(file=name, label="", status="failed", note=note))
    note = "unknown file: nothing replays it"
    unknown = sorted(present - set(REPLAYS) - DOCUMENTS)
    return [*rows, *(Row(file=name, label="", status="failed", note=note) for name in unknown)]


def show(rows: list[Row]) -> None:
    """Print the table and a line that counts the rows by status."""
    table = rich.table.Table(box=rich.box.SIMPLE)
    for column in ("file", "key or case group", "status", "max error", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        style = "" if row.passed else "bold red"
        table.add_row(row.file, row.label, row.status, error, row.note, style=style)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    counts = collections.Counter(row.status for row in rows)
    statuses = ("replayed", "differs", "not there", "failed")
    console.print(", ".join(f"{counts[status]} {status}" for status in statuses))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", nargs="?", default=DATA, help="default: %(default)s"
    )
    folder = parser.parse_args().folder
    if not folder.is_dir():
        print(f"{folder}: no such folder", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # small tensors; also makes sums repeat
    rows = replay(folder)
    show(rows)
    is_replayed = any(row.status in ("replayed", "differs") for row in rows)
    return 0 if is_replayed and all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
