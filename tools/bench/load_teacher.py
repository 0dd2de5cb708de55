"""What it takes to read a big teacher: bytes a rank reads, and the memory that reading needs.

    python tools/bench/load_teacher.py --json         (LLaDA2.0-mini, 16B, expert 8: sliced rank by rank)
    python tools/bench/load_teacher.py --memory --json  (3 of its layers, expert 2: two ranks load at once)

Folders are synthetic (`sparse_model`): true shapes, no bytes. The first compares, for each of 8 ranks, what
it reads with what `tide train --dry-run` prints for it. The second builds the model on each rank, lets it
load, and reports how far memory rose above the rank's own weights (`extra_bytes`, high-water marks; pages of
the mapped files count).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.cost import machine, peak_bytes
from bench.shapes import LLADA2_MINI, QWEN3_06B
from bench.sparse_model import write_sparse
from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.base.units import in_bytes
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models.build import build_model
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.params import local_params, param_mappings
from tide_megatron.models.precision import Precision
from tide_megatron.models.shard import Shard
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import load_model, read_architecture
from tide_megatron.parallel.collectives import gather_objects
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

RANKS = 8
LAYOUT = Layout(expert=RANKS)
"""Each rank also holds its slice of the head, an eighth of the ids."""
RECIPE = """
folder: {folder}/run
steps: 1
student: {{folder: {folder}/student, precision: bf16, context: {{kind: block_diffusion, block_size: 32}}}}
teachers:
  moe:
    folder: {folder}/teacher
    precision: bf16
    context: {{kind: bidirectional}}
    layout: {{expert: {ranks}}}
losses:
  ce: {{kind: cross_entropy}}
  rc: {{kind: reverse_calm, teacher: moe}}
data: {{train: {folder}/data}}
batch: {{samples: {ranks}}}
head: {{ranks: {ranks}}}
"""


def slice_all(folder: Path) -> dict[str, Any]:
    """Read every rank's slices, one rank after the other, and count."""
    architecture = read_architecture(folder)
    ids = -(-architecture.vocabulary // RANKS)
    each = []
    for rank in range(RANKS):
        start = min(rank * ids, architecture.vocabulary)
        head = (start, min(start + ids, architecture.vocabulary))
        shard = Shard.of(LAYOUT, rank, RANKS, architecture.layers, head)
        began, planned, biases = time.perf_counter(), 0, 0
        with HfFolder(folder) as source:
            for _, piece in local_params(architecture, shard):
                for name in piece.sources:
                    part = source.read(name, piece.part(name))
                    if not piece.is_parameter:
                        biases += part.nbytes
                if piece.is_parameter:
                    planned += piece.elements * torch.bfloat16.itemsize
            read = source.bytes_read - biases
        each.append({"planned": planned, "read": read, "seconds": time.perf_counter() - began})
        print(f"rank {rank}: planned {in_bytes(planned)}, read {in_bytes(read)}", file=sys.stderr)
    return {
        "parameters": sum(piece.elements for piece in param_mappings(architecture) if piece.is_parameter),
        "on_disk": sum(file.stat().st_blocks * 512 for file in folder.iterdir()),
        "ranks": each,
        "as_planned": all(rank["planned"] == rank["read"] for rank in each),
    }


def dry_run(folder: Path) -> list[str]:
    """Return the teacher's column of what `tide train --dry-run` draws."""
    write_sparse(folder / "student", QWEN3_06B)
    recipe = folder / "run.yaml"
    recipe.write_text(RECIPE.format(folder=folder, ranks=RANKS), encoding="utf-8")
    command = [sys.executable, "-m", "tide_megatron.commands", "train", recipe]
    command += ["--ranks", str(RANKS), "--dry-run"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return re.findall(r"experts? [\d-]+: ([\d.]+ \w+)", done.stderr)


def load(folder: Path, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Build and load this rank's part of an expert-parallel model; return what memory did."""
    torch.set_num_threads(1)
    layout = Layout(expert=torch.distributed.get_world_size())
    options = ModelOptions(device=device, layout=layout, precision=Precision(name="bf16"))
    model = build_model(read_architecture(folder), make_groups(layout), options)
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    began = time.perf_counter()
    peak, _ = peak_bytes(lambda: load_model(model, folder))
    seconds = time.perf_counter() - began
    mine = {"own_bytes": own, "peak_bytes": peak, "extra_bytes": peak - own, "seconds": seconds}
    return {"ranks": gather_objects(mine)}


def main() -> None:
    """Parse, measure, print."""
    given = _parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.memory:
            write_sparse(folder / "teacher", {**LLADA2_MINI, "num_hidden_layers": given.layers})
            found = run_ranks(load, (folder / "teacher",), 2, "cpu")
        else:
            write_sparse(folder / "teacher", LLADA2_MINI)
            found = {"dry_run": dry_run(folder), **slice_all(folder / "teacher")}
            found["as_drawn"] = found["dry_run"] == [in_bytes(rank["read"]) for rank in found["ranks"]]
    for name, value in found.items():
        print(f"{name:14}{value}")
    if given.json:
        print(json.dumps({**found, **machine()}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--layers", type=int, default=3, help="with --memory: the first is dense")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
