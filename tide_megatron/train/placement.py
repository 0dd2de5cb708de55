"""Which rank holds what: the picture that `tide train --dry-run` prints and a run logs when it starts.

Pure arithmetic over layouts and tables of weights, so it can be drawn for 1,024 ranks on a laptop. Bytes are
those of the weights a rank holds (a frozen model's; the student's in its training precision); gradients,
optimizer states and activations are not in it.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from tide_megatron.base.units import in_bytes
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.params import num_local_bytes
from tide_megatron.models.precision import Fp8Options
from tide_megatron.models.shard import Shard
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.vocab_group import VocabGroup

MOST_RANKS = 64
"""So many ranks are drawn, at most; where the pattern repeats earlier, it is drawn once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """One model of a run."""

    architecture: Architecture
    layout: Layout
    dtype: torch.dtype
    """Of its parameters."""
    fp8: Fp8Options | None = None
    """How its matrices are held; None: in `dtype`."""
    is_student: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """What a rank holds of a model."""

    shard: Shard
    words: tuple[str, ...]
    """How it is cut; empty: whole."""
    layers: int
    """Of the whole model."""


def placement_table(models: Mapping[str, Placed], world: int, head_ranks: int) -> Table:
    """Draw who holds what, one line a rank.

    Args:
        models: student first, by the name they have in the recipe; layouts are checked.
        world: number of ranks.
        head_ranks: size of the vocabulary groups.
    """
    lines = list(_lines(models, world, head_ranks))
    shown = min(period(lines), MOST_RANKS)
    table = Table("rank", *models, "head ids", box=None, title="placement", title_justify="left")
    for rank, line in enumerate(lines[:shown]):
        table.add_row(str(rank), *line)
    if shown < world:
        kind = "repeat this pattern" if period(lines) == shown else "are not drawn"
        table.add_row(f"{shown}..{world - 1}", kind)
    return table


def drawn(table: Table) -> str:
    """Return a table as lines of plain text, for a log."""
    buffer = io.StringIO()
    Console(file=buffer, width=200, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _lines(models: Mapping[str, Placed], world: int, head_ranks: int) -> Iterator[Sequence[str]]:
    """Say what each rank holds, cell by cell."""
    vocabularies = [model.architecture.vocabulary for model in models.values()]
    for rank in range(world):
        group = VocabGroup.of(vocabularies, head_ranks, rank)
        start, stop = group.columns(max(vocabularies))
        yield [
            *(_cell(model, rank, world, group) for model in models.values()),
            "all" if head_ranks == 1 else f"{start}-{stop - 1}" if start < stop else "none",
        ]


def _cell(model: Placed, rank: int, world: int, group: VocabGroup) -> str:
    """Say which part of a model a rank holds, with its weights' bytes."""
    head = None if model.is_student else group.columns(model.architecture.vocabulary)
    held = held_part(model.architecture, model.layout, rank, world, head)
    size = num_local_bytes(model.architecture, held.shard, model.dtype, model.fp8)
    return f"{', '.join(held.words) or 'whole'}: {in_bytes(size)}"


def held_part(
    architecture: Architecture,
    layout: Layout,
    rank: int,
    world: int,
    head: tuple[int, int] | None = None,
) -> Held:
    """Say which part of a model a rank holds.

    Args:
        architecture: of the model.
        layout: of the model, checked.
        rank: 0 .. world - 1.
        world: number of ranks.
        head: ids whose rows of the output head the rank holds; None: all.
    """
    shard = Shard.of(layout, rank, world, architecture.layers, head=head)
    words = []
    if layout.pipeline > 1:
        last = shard.first_layer + shard.num_layers - 1
        words.append(f"stage {layout.coordinates(rank).pipeline} (layers {shard.first_layer}-{last})")
    if layout.tensor > 1:
        words.append(f"shard {shard.tensor_rank + 1}/{shard.tensor_size}")
    if layout.expert > 1:
        share = architecture.num_experts // shard.expert_size
        first = shard.expert_rank * share
        words.append(f"experts {first}-{first + share - 1}" if share > 1 else f"expert {first}")
    if layout.expert_tensor > 1:
        words.append(f"expert shard {shard.expert_tensor_rank + 1}/{shard.expert_tensor_size}")
    return Held(shard=shard, words=tuple(words), layers=architecture.layers)


def period(lines: Sequence[Sequence[object]]) -> int:
    """Return after how many ranks the lines repeat; a divisor of their number."""
    number = len(lines)
    divisors = (size for size in range(1, number + 1) if number % size == 0)
    return next(size for size in divisors if all(lines[i] == lines[i % size] for i in range(number)))
