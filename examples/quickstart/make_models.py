"""Make the quickstart's teacher and base student again, or check the shipped ones against their card.

    make quickstart-models                               (about 25 core-minutes)
    python examples/quickstart/make_models.py --check    score the shipped weights and compare with card.json

Both are trained by the committed recipes, on docstring -> function pairs from
installed sources. The card beside the weights states data, licences, steps, seeds and figures. Held-out text
follows the installed versions of the sources: on other versions a check compares within a wider tolerance.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import rich
import torch
import typer
from data import ensure_data
from safetensors.torch import load_file, save_file

from tide_megatron import __version__
from tide_megatron.base.log import start_log
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.score import Question, score_folder
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import digest, load_recipe

# Read when a rank starts. Models this small lose more at the barriers of two threads than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MODELS = Path("examples/quickstart/models")
CARD = MODELS / "card.json"
RECIPES = {name: Path(f"configs/runs/quickstart_{name}.yaml") for name in ("student", "teacher")}
CONTEXT = Context(kind="block_diffusion", block_size=16)
SAMPLES = 512
TOLERANCE = 1e-3
"""Nats per byte on the very same held-out data (other processors add up in another order)."""
TOLERANCE_OTHER_DATA = 0.05
"""On held-out text of other source versions."""


def make(name: str, folder: Path | None) -> dict[str, Any]:
    """Train one model (or take a finished run), ship its weights in bf16, and return its part of the card."""
    recipe, tree = load_recipe(RECIPES[name], [])
    began = time.monotonic()
    if folder is None:
        folder = Path(recipe.folder)
        run_ranks(train, (recipe, tree, True), 1, "cpu")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    shipped = MODELS / name
    tensors = load_file(folder / "model" / "model.safetensors")
    # A router bias stays fp32, as in the architecture's own checkpoints.
    stored = {
        key: value if key.endswith("expert_bias") else value.to(torch.bfloat16)
        for key, value in tensors.items()
    }
    save_file(stored, shipped / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "model" / "config.json", shipped / "config.json")
    return {
        "recipe": str(RECIPES[name]),
        "digest": digest(tree),
        "steps": recipe.steps,
        "samples_per_step": recipe.batch.samples,
        "seed": recipe.seed,
        "parameters": sum(value.numel() for value in tensors.values()),
        "cpu_seconds": result["cpu_seconds"],
        "made_seconds": round(time.monotonic() - began, 1),
        **score(name, Path("runs/quickstart-data/test")),
    }


def score(name: str, data: Path) -> dict[str, float]:
    """Score the shipped weights on held-out data."""
    question = Question(data=data, context=CONTEXT, samples=SAMPLES)
    scores = run_ranks(score_folder, (MODELS / name, question), 1, "cpu")
    return {key: scores[key] for key in ("nll_per_byte", "masked_accuracy")}


def check(data: Path) -> None:
    """Compare the shipped weights with their card; exit 1 where they differ."""
    card = json.loads(CARD.read_text(encoding="utf-8"))
    same = data_digest(data) == card["data"]["test_digest"]
    limit = TOLERANCE if same else TOLERANCE_OTHER_DATA
    rich.print(f"held-out data {'as on the card' if same else 'of other source versions'}: tolerance {limit}")
    failed = False
    for name in RECIPES:
        now, then = score(name, data / "test"), card["models"][name]
        off = abs(now["nll_per_byte"] - then["nll_per_byte"])
        failed |= off > limit
        rich.print(f"{name}: {now['nll_per_byte']:.4f} nats/byte, card {then['nll_per_byte']:.4f}")
    gap = card["models"]["student"]["nll_per_byte"] - card["models"]["teacher"]["nll_per_byte"]
    rich.print(f"the teacher is {gap:.3f} nats/byte better than the base student (at least 0.3 is wanted)")
    if failed or gap < 0.3:
        raise typer.Exit(1)


def data_digest(data: Path) -> str:
    """Return what names the held-out data."""
    return str(json.loads((data / "test" / "manifest.json").read_text(encoding="utf-8"))["digest"])


def main(
    check_only: Annotated[bool, typer.Option("--check", help="Only compare the shipped weights.")] = False,
    runs: Annotated[
        Path | None, typer.Option(help="Take finished runs `student` and `teacher` from here.")
    ] = None,
) -> None:
    """Train both models and write weights and card, or check them."""
    start_log(0)
    data = ensure_data(Path("runs/quickstart-data"))
    if check_only:
        check(data)
        return
    sources = json.loads((data / "text" / "corpus.json").read_text(encoding="utf-8"))
    card = {
        "what": "docstring -> function models of the quickstart; toys, for showing the engine",
        "licence": "Apache-2.0 (weights); training text under the licences listed with it",
        "version": __version__,
        "data": {"sources": sources, "test_digest": data_digest(data), "scored_samples": SAMPLES},
        "context": "block_diffusion, block 16",
        "models": {name: make(name, runs / name if runs else None) for name in RECIPES},
    }
    CARD.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    rich.print(f"card: {CARD}")
    check(data)


if __name__ == "__main__":
    typer.run(main)
