"""Ask, before step 1, whether each teacher predicts masked tokens at all.

A wrong mask id, template or context kind does not crash: the teacher just predicts badly, and the student
learns that. So every teacher is scored on a few samples and held against what token frequencies alone would
give; a teacher that is no better is refused, or warned of, as the recipe says (design section 9).
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from tide_megatron.base.errors import ConfigError
from tide_megatron.data.loader import Loader
from tide_megatron.evaluate.likelihood import evaluate
from tide_megatron.evaluate.options import Evaluation
from tide_megatron.teachers.teacher import TeacherScorer
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.setup import Setup

log = logging.getLogger(__name__)

TIME, SAMPLES, MICROBATCH = 0.3, 64, 16
COUNTED = 512
"""Samples whose token frequencies are counted."""


def check_teachers(recipe: Recipe, setup: Setup) -> list[dict[str, Any]]:
    """Score every teacher on a few samples and refuse one that knows nothing. All ranks call it together.

    Returns:
        One entry per teacher: name, layout, NLL per byte and per masked token at noise level 0.3.

    Raises:
        ConfigError: a teacher is no better than token frequencies and its `sanity` is `refuse`.
    """
    report = []
    for name, teacher in setup.run.teachers.items():
        choice = recipe.teachers[name]
        if choice.sanity == "off":
            continue
        context = teacher.view_builder.context
        loader = _loader_for(name, setup)
        own = loader.of_teacher(name, 1 if context.kind == "bidirectional" else context.block_size)
        options = Evaluation(times=(TIME,), samples=SAMPLES, microbatch=MICROBATCH)
        scorer = TeacherScorer(teacher=teacher, group=setup.run.head.group)
        scores = evaluate(scorer, context, own, options, setup.run.device)
        nll = scores.by_time()[0]["nll_per_token"]
        chance = frequency_nll(own, teacher.model.architecture.vocabulary)
        log.info(
            "teachers.%s: %.3f nats a masked token at t=%.1f under %s (token frequencies alone: %.3f)",
            name,
            nll,
            TIME,
            context.kind,
            chance,
        )
        if not nll < chance:
            complaint = (
                f"teachers.{name}: predicts masked tokens at {nll:.3f} nats, token frequencies alone give "
                f"{chance:.3f}; check its mask token, chat template and context.kind, "
                f"or set teachers.{name}.sanity=warn"
            )
            if choice.sanity == "refuse":
                raise ConfigError(complaint)
            log.warning(complaint)
        report.append(
            {
                "name": name,
                "layout": str(choice.layout),
                "nll_per_token": nll,
                "frequency_nll_per_token": chance,
                "time": TIME,
            }
        )
    return report


def _loader_for(name: str, setup: Setup) -> Loader:
    """Return held-out data, unless only the training data was prepared for this teacher's own tokens."""
    held_out = setup.held_out
    is_lacking = held_out is not None and name in setup.loader.sides and name not in held_out.sides
    return setup.loader if held_out is None or is_lacking else held_out


def frequency_nll(loader: Loader, vocabulary: int) -> float:
    """Return the entropy, in nats, of the maskable tokens of the first samples (add-one smoothed)."""
    batch = loader.batch_of(range(min(COUNTED, loader.num_samples)))
    counts = torch.bincount(batch.ids[batch.maskable], minlength=vocabulary).double()
    smoothed = (counts + 1) / (counts + 1).sum()
    return float(-(counts / counts.sum() * smoothed.log()).sum())
