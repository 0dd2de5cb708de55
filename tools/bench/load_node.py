"""How the ranks of one node read a teacher: bytes from the disk, seconds, memory, for several ways.

    python tools/bench/load_node.py --ranks 2 4 8 --json
    python tools/bench/load_node.py --ranks 8 --model mixture --latency-ms 2 --megabytes-per-second 1000

Ways: `mapped` (every rank maps the files and touches what it needs), `ahead` (what `load_model` does: ranks
bring large pieces into memory before, hf/ahead.py), `broadcast` (one rank reads and sends by gloo; dense
model only, for there all ranks need all). The model has true shapes and random bytes. Before each load the
kernel forgets the files. With a latency the folder is seen through a file system that is slow as a file
server is (`slow_disk`; root). A single rank runs in this process, so its memory means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.cost import machine, peak_bytes
from bench.shapes import LLADA2_MINI, QWEN3_06B
from bench.slow_disk import slow_view
from bench.sparse_model import write_sparse
from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.base.units import in_bytes
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models import weights
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.mapping import ParamMapping
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import load_model, read_architecture
from tide_megatron.parallel.collectives import barrier, gather_objects
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

MODELS = {
    "dense": QWEN3_06B,
    "mixture": LLADA2_MINI | {"num_hidden_layers": 3, "vocab_size": 32_768},
}
"""1.19 GB that every rank needs; 3.6 GB of which a rank needs its experts and what is dense."""
WAYS = {"dense": ("mapped", "ahead", "broadcast"), "mixture": ("mapped", "ahead")}
_BLOCK = 2**24


def load(folder: Path, way: str, *, device: Device, stop: StopFlag) -> list[dict[str, float]]:
    """Build and load this rank's part; return what that took, of every rank."""
    torch.set_num_threads(1)
    architecture, ranks = read_architecture(folder), dist.get_world_size()
    layout = Layout(expert=ranks) if architecture.num_experts else Layout()
    options = ModelOptions(device=device, layout=layout, precision=Precision(name="bf16"))
    model = build_model(architecture, make_groups(layout), options)
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    barrier()
    before, began, cpu = _io(), time.perf_counter(), time.process_time()
    with contextlib.nullcontext() if way == "ahead" else mock.patch.object(HfFolder, "read_ahead"):
        peak, _ = peak_bytes(lambda: (_broadcast if way == "broadcast" else load_model)(model, folder))
    mine = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    mine |= {name: value - before[name] for name, value in _io().items()}
    return gather_objects(mine | {"own_bytes": own, "extra_bytes": peak - own})


def _io() -> dict[str, float]:
    """Return what this process has read: from the disk, by calls, and faults that waited for the disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    return {"disk_bytes": int(lines["read_bytes"]), "call_bytes": int(lines["rchar"]), "waits": faults}


def _broadcast(model: TideModel, folder: Path) -> None:
    """Read every tensor on rank 0 and send it to all."""
    with HfFolder(folder) as source:

        def parts(mapping: ParamMapping) -> list[torch.Tensor]:
            given = []
            for name, shape in mapping.sources.items():
                first = dist.get_rank() == 0
                whole = source.read(name) if first else torch.empty(shape, dtype=source.dtype(name))
                dist.broadcast(whole, 0)
                given.append(mapping.parts[name].take(whole) if name in mapping.parts else whole)
            return given

        weights._fill(model, parts)


def write_model(folder: Path, config: dict[str, Any]) -> int:
    """Write a model folder of random bytes; return how many."""
    write_sparse(folder, config)
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            size = 8 + int.from_bytes(file.read(8), "little")
            file.seek(size)
            for place in range(size, path.stat().st_size, _BLOCK):
                file.write(os.urandom(min(_BLOCK, path.stat().st_size - place)))
            os.fsync(file.fileno())
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Let the kernel drop what it holds of the folder's files."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(folder: Path, given: argparse.Namespace, size: int) -> Iterator[dict[str, Any]]:
    """Load in every way, on every number of ranks, in turns."""
    for ranks in given.ranks:
        for way in WAYS[given.model] * given.rounds:
            forget(folder)
            with contextlib.ExitStack() as stack:
                view = None
                if given.latency_ms:
                    rate = 1e6 * given.megabytes_per_second
                    view = stack.enter_context(slow_view(folder, given.latency_ms / 1000, rate))
                each = run_ranks(load, (view.folder if view else folder, way), ranks, "cpu")
                disk = view.bytes_served if view else sum(rank["disk_bytes"] for rank in each)
            yield {
                "ranks": ranks,
                "way": way,
                "seconds": max(rank["seconds"] for rank in each),
                "cpu_seconds": sum(rank["cpu_seconds"] for rank in each),
                "disk_over_files": disk / size,
                "most_of_a_rank": max(rank["disk_bytes"] for rank in each) / size,
                "call_bytes": sum(rank["call_bytes"] for rank in each),
                "waits": sum(rank["waits"] for rank in each),
                "extra_bytes": max(rank["extra_bytes"] for rank in each),
                "own_bytes": max(rank["own_bytes"] for rank in each),
            }


def told(one: dict[str, Any], first: float) -> str:
    """Say one load in a line, its seconds also over those of the first way."""
    return (
        f"{one['ranks']} ranks, {one['way']:9}: {one['seconds']:6.2f} s ({one['seconds'] / first:.2f}), "
        f"{one['cpu_seconds']:.1f} CPU s, {one['disk_over_files']:.2f} of the files from the disk, "
        f"{one['waits']:.0f} faults waited, {in_bytes(one['extra_bytes'])} above the rank's "
        f"{in_bytes(one['own_bytes'])}"
    )


def main() -> None:
    """Parse, measure, print."""
    given = _parse()
    found = []
    with tempfile.TemporaryDirectory(dir=given.disk) as name:
        folder = Path(name) / "model"
        size = write_model(folder, MODELS[given.model])
        print(f"{given.model}: {in_bytes(size)}")
        for one in measure(folder, given, size):
            found.append(one)
            first = next(other["seconds"] for other in found if other["ranks"] == one["ranks"])
            print(told(one, first), flush=True)
    if given.json:
        print(json.dumps({"model": given.model, "files_bytes": size, "loads": found, **machine()}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=1, help="of every way, in turns")
    parser.add_argument("--disk", help="a folder on the disk to measure; default: the temporary one")
    parser.add_argument(
        "--latency-ms", type=float, default=0.0, help="of a slow file system; 0: the disk itself"
    )
    parser.add_argument("--megabytes-per-second", type=float, default=1000.0, help="of the slow file system")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
