"""Which rank holds what: a card a rank, a box a model, filled where the rank has its weights.

A box is a model from its first layer (top) to its last, attention on the left, feed-forward layers or experts
on the right; the bar under it is the vocabulary of the heads. What is filled is what the rank holds.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

from tide_megatron.base.errors import TideError
from tide_megatron.models.shard import Shard
from tide_megatron.models.weights import read_architecture
from tide_megatron.parallel.vocab_group import VocabGroup
from tide_megatron.report.reading import ReportedRun
from tide_megatron.train.models import check_layout, head_ranks
from tide_megatron.train.placement import Held, held_part, period
from tide_megatron.train.recipe import Model

MOST_CARDS = 16
SIZE, GAP, BAR = 48, 3, 6
"""Of a box, of what is free between its halves, of the bar under it."""


def layout_picture(run: ReportedRun) -> tuple[str, str]:
    """Return the cards as HTML, and what cannot be drawn in a sentence; one of both is empty."""
    if run.recipe is None:
        return "", "The layout is not shown: this release cannot read the recipe."
    world = run.ranks
    if world is None:
        return "", "The layout is not shown: the run never started, so nobody knows on how many ranks."
    models: dict[str, Model] = {"student": run.recipe.student, **run.recipe.teachers}
    try:
        architectures = {name: read_architecture(Path(model.folder)) for name, model in models.items()}
        for name, model in models.items():
            check_layout(model, architectures[name], world, name)
        group_size = head_ranks(run.recipe, world)
    except TideError as fault:
        return "", f"The layout is not shown: {fault}"
    lines = [
        {name: held_part(architectures[name], model.layout, rank, world) for name, model in models.items()}
        for rank in range(world)
    ]
    vocabularies = [architecture.vocabulary for architecture in architectures.values()]
    groups = [VocabGroup.of(vocabularies, group_size, rank) for rank in range(world)]
    words = [
        [*(held.words for held in line.values()), group.rank]
        for line, group in zip(lines, groups, strict=True)
    ]
    shown = min(period(words), MOST_CARDS)
    cards = "".join(
        _card(rank, line, groups[rank], max(vocabularies)) for rank, line in enumerate(lines[:shown])
    )
    others = f"Ranks {shown} to {world - 1} are" if world - shown > 1 else f"Rank {shown} is"
    rest = f'<p class="small dim">{others} not drawn: the pattern goes on.</p>'
    return f'<div class="ranks">{cards}</div>' + rest * (shown < world), ""


def _card(rank: int, line: dict[str, Held], group: VocabGroup, vocabulary: int) -> str:
    boxes = "".join(
        f'<div class="held">{_box(held, number)}<span><b>{html.escape(name)}</b><br>'
        f"{html.escape(', '.join(held.words) or 'whole')}</span></div>"
        for number, (name, held) in enumerate(line.items())
    )
    start, stop = group.columns(vocabulary)
    words = (
        "all ids" if stop - start == vocabulary else f"ids {start} to {stop - 1}" if start < stop else "none"
    )
    bar = _svg(
        BAR,
        _rectangle(0, 0, SIZE, BAR, 6, is_filled=False)
        + _rectangle(SIZE * start / vocabulary, 0, SIZE * (stop - start) / vocabulary, BAR, 6),
    )
    heads = f'<div class="held">{bar}<span><b>heads</b> {words}</span></div>'
    return f'<div class="rank"><h3>rank {rank}</h3>{boxes}{heads}</div>'


def _box(held: Held, number: int) -> str:
    """Draw one model of a rank."""
    half, shard = (SIZE - GAP) / 2, held.shard
    top, height = SIZE * shard.first_layer / held.layers, SIZE * shard.num_layers / held.layers
    parts = []
    for left, (place, of) in zip((0.0, half + GAP), _shares(shard), strict=True):
        parts.append(_rectangle(left, 0, half, SIZE, number, is_filled=False))
        parts.append(_rectangle(left + half * place / of, top, half / of, height, number))
    return _svg(SIZE, "".join(parts))


def _shares(shard: Shard) -> Iterator[tuple[int, int]]:
    """Yield (which, of how many) parts of the attention, then of the feed-forward layers."""
    yield shard.tensor_rank, shard.tensor_size
    if shard.expert_size > 1 or shard.expert_tensor_size > 1:
        of = shard.expert_size * shard.expert_tensor_size
        yield shard.expert_rank * shard.expert_tensor_size + shard.expert_tensor_rank, of
    else:
        yield shard.tensor_rank, shard.tensor_size


def _rectangle(
    x: float, y: float, width: float, height: float, number: int, *, is_filled: bool = True
) -> str:
    colour = f"var(--c{number % 7})"
    look = f"fill:{colour};fill-opacity:.75" if is_filled else f"fill:none;stroke:{colour};stroke-opacity:.5"
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" style="{look}"/>'


def _svg(height: float, inner: str) -> str:
    return f'<svg viewBox="-1 -1 {SIZE + 2} {height + 2}" aria-hidden="true">{inner}</svg>'
