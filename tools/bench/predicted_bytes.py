"""What a run will hold on each rank, counted before a model is there: weights, gradients, moments, slabs.

    python tools/bench/predicted_bytes.py configs/runs/paper_pair.yaml --ranks 8
    python tools/bench/predicted_bytes.py FILE --ranks 8 teachers.llada.layout.expert=4

Weights are those of the table that `tide train --dry-run` draws (`train.placement`). Models whose folders are
not there are those of `bench.shapes`, by the folder's name. Gradients are the fp32 sums of megatron-core's
wrapper, the optimizer's share fp32 masters and both moments, spread over all ranks where it is distributed;
a slab of the head is as large as the recipe lets it grow on CUDA. Activations are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.shapes import FOLDERS
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.units import in_bytes
from tide_megatron.head.budget import BUDGET_MIB, MIB, HeadShape, kept_heads, row_bytes
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.params import num_local_bytes
from tide_megatron.models.shard import Shard
from tide_megatron.models.weights import read_architecture
from tide_megatron.parallel.vocab_group import VocabGroup
from tide_megatron.train.models import check_layout, head_ranks, placed
from tide_megatron.train.placement import Placed, drawn, placement_table
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import load_recipe

GPU = Device(type="cuda", index=0, backend="nccl", threads=1)
FP32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bytes of the rank that holds most."""

    weights: dict[str, int]
    """By model, the student first."""
    gradients: int
    """The student's, summed in fp32."""
    optimizer: int
    """This rank's fp32 masters and moments."""
    slab: int
    """Of the head, at most."""
    slab_rows: int
    """Masked positions that fit into one."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.weights.values()) + self.gradients + self.optimizer + self.slab


def architecture_of(folder: str) -> Architecture:
    """Return what a folder of a recipe holds, or the model of that name where it is not there.

    Raises:
        ConfigError: neither is known.
    """
    path = Path(folder)
    if (path / "config.json").is_file():
        return read_architecture(path)
    if path.name not in FOLDERS:
        raise ConfigError(f"{folder}: no config.json there, and only {', '.join(FOLDERS)} are known by name")
    config = FOLDERS[path.name]
    return ARCHITECTURES[config["model_type"]].from_hf(config)


def place(recipe: Recipe, world: int) -> tuple[dict[str, Placed], int]:
    """Return the models of a recipe as the dry run places them, and over how many ranks heads are cut.

    Raises:
        ConfigError: a layout does not fit the ranks or a model.
    """
    models = {}
    for name, choice in {"student": recipe.student, **recipe.teachers}.items():
        architecture = architecture_of(choice.folder)
        check_layout(choice, architecture, world, name if name == "student" else f"teachers.{name}")
        models[name] = placed(choice, architecture, GPU)
    return models, head_ranks(recipe, world)


def predict(recipe: Recipe, world: int) -> Prediction:
    """Count what the fullest rank holds.

    Raises:
        ConfigError: as `place`.
    """
    models, ranks = place(recipe, world)
    weights = {name: _weights(models, name, world, ranks) for name in models}
    trained = weights["student"] // models["student"].dtype.itemsize
    shards = world if recipe.optimizer.distributed else 1
    shapes = {name: HeadShape(model.architecture.vocabulary, model.dtype) for name, model in models.items()}
    row = row_bytes(kept_heads(recipe.terms, shapes, recipe.head.is_exact), ranks)
    slab = (recipe.head.budget_mib or BUDGET_MIB["cuda"]) * MIB
    return Prediction(
        weights=weights,
        gradients=FP32 * trained,
        optimizer=3 * FP32 * trained // shards,
        slab=slab,
        slab_rows=slab // row,
    )


def _weights(models: dict[str, Placed], name: str, world: int, ranks: int) -> int:
    """Return the bytes of one model's weights on the rank that holds most of them."""
    model, shards = models[name], set()
    for rank in range(world):
        group = VocabGroup.of([other.architecture.vocabulary for other in models.values()], ranks, rank)
        head = None if model.is_student else group.columns(model.architecture.vocabulary)
        if head is not None and not model.architecture.tied:
            head = (0, head[1] - head[0])  # which ids they are changes no number of bytes, nor which experts
        shard = Shard.of(model.layout, rank, world, model.architecture.layers, head=head)
        shards.add(dataclasses.replace(shard, expert_rank=0))
    return max(num_local_bytes(model.architecture, shard, model.dtype, model.fp8) for shard in shards)


def told(found: Prediction) -> str:
    """Write a prediction in lines."""
    parts = [f"{name} {in_bytes(size)}" for name, size in found.weights.items()]
    return (
        f"the fullest rank: weights {', '.join(parts)}; student's gradients {in_bytes(found.gradients)}, "
        f"masters and moments {in_bytes(found.optimizer)}; head slab up to {in_bytes(found.slab)} "
        f"({found.slab_rows} rows); together {in_bytes(found.total)}, without activations"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Parse, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a run file")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--ranks", type=int, required=True)
    given = parser.parse_intermixed_args(words)
    # How many steps there are does not matter here, and epochs would ask for the data.
    recipe, _ = load_recipe(given.file, ["epochs=null", "steps=1", *given.overrides])
    models, ranks = place(recipe, given.ranks)
    print(drawn(placement_table(models, given.ranks, ranks)))
    print(told(predict(recipe, given.ranks)))


if __name__ == "__main__":
    main()
