"""What it takes to open ten million samples, read them in shuffled order, blend them and go on in the middle.

    python tools/bench/open_data.py --samples 10000000 --json

The columns are real files of megatron-core's form with real indices; the values are holes that the disk
gives as zeros (sparse files), apart from what a row needs to be one. Seconds and memory are those of a fresh
process for each part, from behind its imports: `private_bytes` is what it allocated, `mapped_bytes` the pages
of files that it looked at, which all processes of a node share and the kernel may take away. After writing
they lie in the page cache in large pieces, of which each touch maps a whole one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.cost import machine
from tide_megatron.data.blend import BlendedData, BlendSource
from tide_megatron.data.columns import SOURCE, write_index
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.data.manifest import DataStatistics, Manifest, TokenizerMetadata

TOKENS = 16
"""Of every sample."""
UPDATE = 64
PARTS = ("one", "blend")
LIMIT_SECONDS, LIMIT_BYTES = 1.0, 200 * 2**20


def write(folder: Path, samples: int) -> None:
    """Write a data set of so many samples of one length, of two sources."""
    folder.mkdir(parents=True)
    widths = {"ids": TOKENS, "replies": 2, "reply_bytes": 1, SOURCE: 1}
    for name, width in widths.items():
        values = folder / f"{name}.bin"
        if name == "replies":  # a reply of nothing would be no row
            numpy.tile(numpy.array([4, TOKENS], dtype=numpy.int32), samples).tofile(values)
        else:
            values.touch()
            os.truncate(values, samples * width * 4)
        lengths = folder / "lengths"
        numpy.full(samples, width, dtype="<i4").tofile(lengths)
        write_index(folder / f"{name}.idx", lengths)
        lengths.unlink()
    files = {file.name: {"bytes": file.stat().st_size, "sha256": "0" * 64} for file in folder.iterdir()}
    numbers = {"vocabulary_size": 100, "mask_id": 1, "eos_id": 2, "pad_id": 2}
    digests = dict.fromkeys(("digest", "vocabulary_digest", "template_digest"), "0" * 64)
    Manifest(
        samples=samples,
        columns={name: samples * width for name, width in widths.items()},
        files=files,
        tokenizer=TokenizerMetadata(name="none", **digests, **numbers),
        max_length=TOKENS,
        on_long="error",
        sources=[],
        statistics=DataStatistics(longest=TOKENS),
        source_names=["one", "other"],
    ).write(folder)


def opened(folder: Path, part: str) -> PreparedData | BlendedData:
    """Open the data set, or a blend of it and of as much again."""
    if part == "one":
        return PreparedData(folder, compare_digests=False)
    sources = {
        name: (BlendSource(folder=str(folder), weight=weight), PreparedData(folder, compare_digests=False))
        for name, weight in (("first", 3.0), ("second", 1.0))
    }
    return BlendedData(sources, seed=7)


def held() -> tuple[int, int]:
    """Return this process's own bytes, and those of files that it has mapped."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared, memory.shared


def measure(folder: Path, part: str) -> dict[str, float]:
    """Open, and read an update at the start and one far on; return seconds and bytes."""
    private, mapped = held()
    began = time.perf_counter()
    loader = Loader(columns=opened(folder, part), samples=UPDATE, seed=7, deal="length")
    opened_at = time.perf_counter()
    loader.update(0)
    first_at = time.perf_counter()
    loader.update(3 * len(loader.columns) + 12_345)
    done = time.perf_counter()
    return {
        "open_seconds": opened_at - began,
        "first_update_seconds": first_at - opened_at,
        "resumed_update_seconds": done - first_at,
        "seconds": done - began,
        "private_bytes": held()[0] - private,
        "mapped_bytes": held()[1] - mapped,
    }


def measured_apart(folder: Path, part: str) -> dict[str, float]:
    """Measure in a process of its own."""
    words = [sys.executable, __file__, "--measure", part, "--folder", str(folder)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="with data that was written here before")
    parser.add_argument("--json", action="store_true", help="print one line of JSON at the end")
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place) / "data"
        if not folder.exists():
            write(folder, options.samples)
        parts = {part: measured_apart(folder, part) for part in PARTS}
        for part, found in parts.items():
            print(
                f"{part}: opened in {found['open_seconds']:.3f} s, first update "
                f"{found['first_update_seconds']:.3f} s, one far on {found['resumed_update_seconds']:.3f} s, "
                f"{found['private_bytes'] / 2**20:.0f} MiB of its own, {found['mapped_bytes'] / 2**20:.0f} "
                "MiB of files"
            )
        within = all(
            found["seconds"] <= LIMIT_SECONDS and found["private_bytes"] <= LIMIT_BYTES
            for found in parts.values()
        )
        if options.json:
            print(json.dumps({"samples": options.samples, **parts, "within": within, **machine()}))


if __name__ == "__main__":
    main()
