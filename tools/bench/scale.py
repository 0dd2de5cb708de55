"""What a plan of one rank costs at any number of ranks: seconds and memory of this process.

    python tools/bench/scale.py configs/runs/paper_pair.yaml                    (worlds 8, 64, 1024, 4096)
    python tools/bench/scale.py FILE --worlds 8,64 teachers.llada.layout.expert=1

Each world has a process of its own. Models are those of `bench.shapes`, by the names of the recipe's folders;
a rank reads two microbatches of 4 samples of 512 tokens, and makes two steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.shapes import FOLDERS

MICROBATCH, MICROBATCHES, LENGTH = 4, 2, 512


def measure(file: Path, overrides: list[str], world: int) -> dict[str, float]:
    """Plan the last rank of the first vocabulary group but in the middle of the world; return its costs."""
    import torch

    torch.set_num_threads(1)
    from tide_megatron.plan.job import make_job, read_shapes
    from tide_megatron.plan.one_rank import record_rank
    from tide_megatron.train.resolve import load_recipe

    imported = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for name, config in FOLDERS.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        recipe, _ = load_recipe(file, ["epochs=null", "steps=1", *overrides])
        words = [
            f"batch.samples={MICROBATCH * MICROBATCHES * world}",
            f"batch.microbatch={MICROBATCH}",
            f"student.folder={folder}/{Path(recipe.student.folder).name}",
            *(
                f"teachers.{name}.folder={folder}/{Path(choice.folder).name}"
                for name, choice in recipe.teachers.items()
            ),
        ]
        recipe, _ = load_recipe(file, ["epochs=null", "steps=1", *overrides, *words])
        shapes = read_shapes(recipe)
    job = make_job(recipe, shapes, world=world, length=LENGTH)
    began, cpu = time.perf_counter(), time.process_time()
    record = record_rank(job, world // 2 + 1)
    _, peak = record.peak
    return {
        "world": world,
        "import_cpu_seconds": round(imported, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "seconds": round(time.perf_counter() - began, 2),
        "megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "planned_peak_gb": round(peak.num_bytes / 1e9, 3),
    }


def main() -> None:
    """Measure each world in a process of its own, and print a line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--worlds", default="8,64,1024,4096")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args()
    if given.one is not None:
        print(json.dumps(measure(given.file, given.overrides, given.one)))
        return
    for world in given.worlds.split(","):
        words = [sys.executable, "-W", "ignore", __file__, str(given.file), *given.overrides, "--one", world]
        print(subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
