"""What dealing an update's samples by length saves: positions that are pads, and the time they take.

    python tools/bench/dealing.py --json               (counts pads, then trains all ways in turns)
    python tools/bench/dealing.py --pairs 0 --json     (counts only)

Counts the student's positions of whole updates over one epoch, as they come (`order`, the baseline), dealt
by length (`length`), cut by a budget of positions (`tokens`: what the longest samples need in the others),
and by that budget with several samples in a row (`pack`), for several ranks and microbatches: of the
quickstart's data, and of chats of mixed lengths made of it (functions joined until a log-normal length is
reached: median 96 tokens, sigma 0.9, at most 480). Then trains the quickstart's student beside its mixture
on two CPU ranks on the mixed lengths, all ways in turns, and compares CPU seconds. Needs the quickstart's
data (`python examples/quickstart/data.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.cost import machine
from bench.fp8_students import RECIPE, TEACHER
from tide_megatron import api
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.diffusion.packing import place_samples
from tide_megatron.parallel.layout import DataShard
from tide_megatron.text.tokenizer import Tokenizer

STUDENT = Path("examples/quickstart/models/student")
WAYS = ("order", "length", "tokens", "pack")
CUTS = ((1, 64, 1), (2, 8, 4), (8, 8, 1), (8, 8, 4), (64, 8, 1))
"""(ranks, samples a microbatch, microbatches an update)."""


def pads(data: PreparedData, way: str, cut: tuple[int, int, int], block_size: int) -> dict[str, float]:
    """Return the share of positions that are pads, and the time lost where ranks wait for the longest one.

    Args:
        data: prepared.
        way: how updates are shared out, of `WAYS`; the last two have as many positions as `order` may need.
        cut: of `CUTS`.
        block_size: samples are filled up to whole ones.
    """
    ranks, samples, accumulate = cut
    loader = Loader(
        columns=data,
        samples=samples,
        accumulate=accumulate,
        shard=DataShard(rank=0, size=ranks),
        deal="order" if way == "order" else "length",
        block_size=block_size,
    )
    if way in ("tokens", "pack"):
        budget = samples * loader.rungs[0].lengths[-1]
        loader = dataclasses.replace(loader, tokens=budget, pack=way == "pack")
    tokens = positions = waited = passes = updates = 0
    lengths = set()
    for consumed in range(0, len(data) - loader.update_samples, loader.update_samples):
        found, dealt = loader.dealt(consumed)
        real = data.lengths([row for row, _ in found], [None])[:, 0]
        real = -(-real // block_size) * block_size
        tokens, updates = tokens + int(real.sum()), updates + 1
        for turn in zip(*dealt, strict=True):
            read = [real[list(one.places)] for one in turn]
            own = [
                int(one.lengths[0] if one.lengths else of.max()) for one, of in zip(turn, read, strict=True)
            ]
            rows = [
                len(place_samples(of.tolist(), length, block_size)[1].ends) if way == "pack" else len(of)
                for of, length in zip(read, own, strict=True)
            ]
            work = [number * length for number, length in zip(rows, own, strict=True)]
            lengths |= set(own)
            positions, waited, passes = positions + sum(work), waited + len(work) * max(work), passes + 1
    return {
        "pads": 1 - tokens / positions,
        "pads_and_waiting": 1 - tokens / waited,
        "microbatches": passes / updates,
        "lengths": len(lengths),
    }


def cpu_seconds(folder: Path, data: Path, way: str, steps: int) -> tuple[float, float]:
    """Train on two ranks; return CPU seconds and the last update's loss."""
    budget = ["batch.tokens=4096", f"batch.pack={str(way == 'pack').lower()}"]
    cut = budget if way in ("tokens", "pack") else ["batch.microbatch=8", f"batch.deal={way}"]
    words = [f"folder={folder}", f"data.train={data}", f"steps={steps}", "device=cpu", *cut]
    words += ["batch.samples=64", "evaluation.samples=16", "metrics.every=1"]
    result = api.train(RECIPE, [*words, *TEACHER], ranks=2, resume=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result["cpu_seconds"], [line["loss"] for line in lines if line["kind"] == "train"][-1]


def write_mixed(source: Path, folder: Path) -> None:
    """Prepare chats of mixed lengths, the same ones every time.

    Args:
        source: JSONL chats, a function each.
        folder: where to.
    """
    draws, tokenizer = random.Random(7), Tokenizer.load(STUDENT)
    chats = [json.loads(line)["messages"] for line in source.read_text().splitlines()]
    draws.shuffle(chats)
    left, lines = iter(chats), []
    for *_, request, reply in left:
        wanted = min(480.0, 96 * math.exp(draws.gauss(0, 0.9)))
        text = reply["content"]
        while len(tokenizer.encode(text)) < wanted - 48 and (more := next(left, None)):
            text += "\n" + more[-1]["content"]
        record = [request, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"messages": record}))
    file = folder / "mixed.jsonl"
    file.write_text("\n".join(lines))
    prepare([file], tokenizer, folder / "mixed", max_length=512, on_long="truncate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart-data"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        write_mixed(given.data / "text/train.jsonl", Path(folder))
        for name, path in (("quickstart", given.data / "train"), ("mixed", Path(folder) / "mixed")):
            found[name] = counted(PreparedData(path))
            print(f"{name}: {json.dumps(found[name], indent=1)}", flush=True)
        ratios = []
        for number in range(given.pairs):
            spent = {
                way: cpu_seconds(Path(folder) / f"{way}-{number}", Path(folder) / "mixed", way, given.steps)
                for way in WAYS
            }
            ratios.append({way: spent["order"][0] / spent[way][0] for way in WAYS[1:]})
            print(f"pair {number}: CPU seconds, last loss {spent}: {ratios[-1]} times", flush=True)
    for way, name in zip(WAYS[1:], ("dealt_ratio", "budget_ratio", "packed_ratio"), strict=True):
        found[name] = statistics.median(ratio[way] for ratio in ratios) if ratios else None
    if given.json:
        print(json.dumps(found))


def counted(data: PreparedData) -> dict[str, Any]:
    """Return the share of pads for every cut, all ways."""
    cuts = {
        f"{ranks} ranks x {accumulate} x {size}": (ranks, size, accumulate)
        for ranks, size, accumulate in CUTS
    }
    shares = {
        name: {way: pads(data, way, cut, block_size=16) for way in WAYS}
        for name, cut in cuts.items()
        if math.prod(cut) < len(data)
    }
    return {"samples": len(data), "longest": data.manifest.statistics.longest, "shares": shares}


if __name__ == "__main__":
    main()
