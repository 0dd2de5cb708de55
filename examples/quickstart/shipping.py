"""Make the small models that the examples ship: train, store in bf16, score, keep a card to check against.

The card beside the weights states data, licences, steps, seeds and figures. Held-out text follows the
installed versions of the sources: on other versions a check compares within a wider tolerance.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from safetensors.torch import load_file, save_file

from tide_megatron import __version__
from tide_megatron.base.errors import DataError
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.likelihood import score_folder
from tide_megatron.evaluate.model_folder import write_context
from tide_megatron.evaluate.options import Evaluation
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import digest, load_recipe

# Read when a rank starts. Models this small lose more at the barriers of two threads than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SAMPLES = 512
TOLERANCE = 1e-3
"""Nats per byte on the very same held-out data (other processors add up in another order)."""
TOLERANCE_ANSWERS = 0.005
"""In the share of right answers, of models that are asked questions: a near tie may fall the other way."""
TOLERANCE_OTHER_DATA = 0.05
"""On held-out text of other source versions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shipped:
    """One model: where it lies, the recipe that makes it, and how it is scored."""

    folder: Path
    recipe: Path
    context: Context
    data: Path
    """Held-out data in the model's own tokens."""

    def score(self) -> dict[str, Any]:
        """Score the shipped weights."""
        options = Evaluation(samples=SAMPLES)
        scores = run_ranks(score_folder, (self.folder, self.data, self.context, options), 1, "cpu")
        return {key: scores[key] for key in ("nll_per_byte", "masked_accuracy")}

    def make(self, run: Path | None) -> dict[str, Any]:
        """Train the model (or take a finished run), ship its weights, and return its part of the card."""
        recipe, tree = load_recipe(self.recipe, [])
        took = {}
        if run is None:
            run, began = Path(recipe.folder), time.monotonic()
            run_ranks(train, (recipe, tree, True), 1, "cpu")
            took["made_seconds"] = round(time.monotonic() - began, 1)
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        tensors = load_file(run / "model" / "model.safetensors")
        # A router bias stays fp32, as in the architecture's own checkpoints.
        stored = {
            key: value if key.endswith("expert_bias") else value.to(torch.bfloat16)
            for key, value in tensors.items()
        }
        save_file(stored, self.folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(run / "model" / "config.json", self.folder / "config.json")
        write_context(self.folder, self.context)
        return {
            "recipe": str(self.recipe),
            "digest": digest(tree),
            "steps": recipe.steps,
            "samples_per_step": recipe.batch.samples,
            "seed": recipe.seed,
            "parameters": sum(value.numel() for value in tensors.values()),
            "cpu_seconds": result["cpu_seconds"],
            **took,
            **self.score(),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Makers:
    """Which models of a card are made, and from what."""

    runs: Path | None = None
    """Folder with finished runs under the models' names; None: train."""
    only: Sequence[str] = ()
    """Names of those that are made; empty: all."""

    def run(self, name: str) -> Path | None:
        """Return a model's finished run, or None to train it."""
        return self.runs / name if self.runs else None


def write_card(file: Path, what: str, text: Path, models: Mapping[str, Shipped], makers: Makers) -> None:
    """Make the models of a card, or some of them, and write the card; the others keep their entries.

    Raises:
        DataError: an entry would be kept that was scored on other held-out data than there is now.
    """
    kept = _entries(file, models) if makers.only else {}
    context = next(iter(models.values())).context
    block = "" if context.kind == "bidirectional" else f", block {context.block_size}"
    entries = {
        name: kept[name] if makers.only and name not in makers.only else model.make(makers.run(name))
        for name, model in models.items()
    }
    card = {
        "what": what,
        "licence": "Apache-2.0 (weights); training text under the licences listed with it",
        "version": __version__,
        "data": {
            "sources": json.loads((text / "corpus.json").read_text(encoding="utf-8")),
            "test_digest": _data_digest(models),
            "scored_samples": SAMPLES,
        },
        "context": f"{context.kind}{block}",
        "models": entries,
    }
    file.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    rich.print(f"card: {file}")


def score_anew(file: Path, models: Mapping[str, Shipped]) -> None:
    """Write what the shipped weights score on the held-out data of today into their card."""
    card = json.loads(file.read_text(encoding="utf-8"))
    card["data"] |= {"test_digest": _data_digest(models), "scored_samples": SAMPLES}
    for name, model in models.items():
        card["models"][name] |= model.score()
    file.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def _entries(file: Path, models: Mapping[str, Shipped]) -> dict[str, Any]:
    """Return a written card's entries, which hold for the held-out data of today only."""
    card = json.loads(file.read_text(encoding="utf-8"))
    if card["data"]["test_digest"] != _data_digest(models):
        raise DataError(f"{file}: scored on other held-out data; make all its models again, without --only")
    entries: dict[str, Any] = card["models"]
    return entries


def agrees_with_card(file: Path, models: Mapping[str, Shipped]) -> bool:
    """Score the shipped weights and say whether they are within the tolerance of their card."""
    card = json.loads(file.read_text(encoding="utf-8"))
    same = _data_digest(models) == card["data"]["test_digest"]
    limit = TOLERANCE if same else TOLERANCE_OTHER_DATA
    rich.print(f"held-out data {'as on the card' if same else 'of other source versions'}: tolerance {limit}")
    agrees = True
    for name, model in models.items():
        now, then = model.score(), card["models"][name]
        agrees &= abs(now["nll_per_byte"] - then["nll_per_byte"]) <= limit
        rich.print(f"{name}: {now['nll_per_byte']:.4f} nats/byte, card {then['nll_per_byte']:.4f}")
        if "exact_match" in then:
            agrees &= abs(now["exact_match"] - then["exact_match"]) <= TOLERANCE_ANSWERS
            rich.print(f"{name}: {now['exact_match']:.1%} right, card {then['exact_match']:.1%}")
    return agrees


def card_score(file: Path, name: str) -> float:
    """Return a model's nats per byte as its card has it."""
    return float(json.loads(file.read_text(encoding="utf-8"))["models"][name]["nll_per_byte"])


def _data_digest(models: Mapping[str, Shipped]) -> str:
    """Return what names the held-out data (one for all models of a card)."""
    folder = next(iter(models.values())).data
    return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["digest"])
