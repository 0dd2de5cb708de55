"""Microbatches of several sources, two teachers and their heads, for tests of heads cut by vocabulary.

Hidden rows and weights are multiples of 1/16, so that every logit is exact in fp32 whatever the shape of its
product; what differs between two forms is then the form. Everything is a function of (case, source).
"""

from __future__ import annotations

import dataclasses

import torch

from tests.unit.diffusion.sides import chunks_of, random_batch
from tests.unit.losses.pairs import has_teacher
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import IGNORED
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.losses import LOSSES
from tide_megatron.losses.base import ColumnLoss

CLOCK = Clock(step=90, total_steps=100)
WIDTHS = {"student": 6, "same": 5, "other": 7}
"""Hidden sizes. Teacher `same` reads the student's tokens, `other` has tokens of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What varies."""

    student: int = 211
    same: int = 211
    other: int = 211
    shared: int | None = None
    """First ids that losses by column compare."""
    empty: str = "no source"
    """Which sources hide nothing: `no source`, `last` or `all`."""
    scale: float = 1.0
    """Factor of hidden rows."""
    tied: bool = False
    """Whether the student's rows also depend on its head as on an embedding."""


CASES = {
    "one vocabulary": Case(),
    "few shared ids": Case(shared=50),
    "three vocabularies": Case(same=190, other=320, shared=180),
    "a source without rows": Case(empty="last"),
    "no rows": Case(empty="all"),
    "large logits": Case(scale=9.5),
    "tied": Case(tied=True),
}


def draw(*shape, seed):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 16).round() / 16


def noised_of(case, source, sources):
    """Return a source's noised microbatch; every second chunk of one token on each side is a pair."""
    batch = random_batch(seed=70 + source, samples=2 + source % 2, length=16, teacher_length=19)
    generator = torch.Generator().manual_seed(source)
    batch.ids.random_(0, min(case.student, case.same), generator=generator)  # both have these
    batch.labels[batch.labels != IGNORED] = batch.ids[batch.labels != IGNORED]
    side = batch.sides["t0"]
    side.ids.random_(0, case.other, generator=generator)
    for sample, mine, theirs in chunks_of(side):
        if len(mine) == len(theirs) == 1:
            side.ids[sample, theirs[0]] = batch.ids[sample, mine[0]]
    batch = dataclasses.replace(batch, sides={"other": side})
    is_empty = case.empty == "all" or (case.empty == "last" and sources > 1 and source == sources - 1)
    return Noiser(seed=source).at(batch, 0.0 if is_empty else 0.6 + 0.1 * (source % 4))


def heads_of(case):
    """Return every whole head, [vocabulary, hidden]."""
    return {name: draw(getattr(case, name), width, seed=width) for name, width in WIDTHS.items()}


def hidden_of(case, noised, source):
    """Return every model's hidden rows of a source, [rows, hidden]."""
    rows = int(noised.masked.sum())
    numbers = {"student": rows, "same": rows, "other": int(noised.reading("other").targets.sum())}
    return {
        name: draw(numbers[name], width, seed=1000 * source + width) * case.scale
        for name, width in WIDTHS.items()
    }


def losses_of(name, case):
    """Return one loss of the table at each teacher that it may listen to, or all of them at once."""
    if name == "all":
        return {key: loss for kind in LOSSES for key, loss in losses_of(kind, case).items()}
    kind = LOSSES[name]
    if not has_teacher(kind):
        return {name: kind(weight=0.75)}
    options = {"shared_vocab_size": case.shared} if issubclass(kind, ColumnLoss) else {"temperature": 9.0}
    return {
        f"{name} {teacher}": kind(teacher=teacher, weight=weight, **options)
        for teacher, weight in (("same", 0.5), ("other", 1.5))
    }


def counts_of(losses, parts):
    """Sum the divisors of all sources; other head groups have rows too, so none is 0."""
    return {name: sum(loss.count(part) for part in parts) + 3.0 for name, loss in losses.items()}
