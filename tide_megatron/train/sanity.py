"""Ask, before step 1, whether each model predicts masked tokens with the mask token that it is shown.

A wrong mask token, template or context kind does not crash: the teacher just predicts badly, and the student
learns that. So every teacher is scored on a few samples and held against three things: what token frequencies
alone would give; the student as it stands before its first step, at the same noise; and, where its folder
does not name its mask token, itself with the other special tokens that sound like one. The last is asked of
students, too. What fails is refused, or warned of, as the recipe says (design section 9).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from tide_megatron.base.errors import ConfigError
from tide_megatron.data.loader import Loader
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.likelihood import ModelScorer, Scorer, evaluate
from tide_megatron.evaluate.options import Evaluation
from tide_megatron.parallel.collectives import is_first
from tide_megatron.teachers.teacher import TeacherScorer
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.setup import Setup

log = logging.getLogger(__name__)

TIME, SAMPLES, MICROBATCH = 0.3, 64, 16
COUNTED = 512
"""Samples whose token frequencies are counted."""
WORSE = 1.05
"""A teacher is complained of when a byte costs it more than this many times what it costs the student."""
BETTER = 0.9
"""A mask token is complained of when another one costs less than this share of its NLL."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """NLL in nats at noise level TIME."""

    per_token: float
    """Of a masked token."""
    per_byte: float
    """Of reply text: what models of different tokenizers are compared by."""


def check_student(recipe: Recipe, setup: Setup) -> None:
    """Refuse a student that predicts better with another mask token. All ranks call it together.

    Asked only where its folder names no mask token and another special token sounds like one. A student that
    predicts nothing yet, whatever it is shown, passes.

    Raises:
        ConfigError: on every rank alike, if its `sanity` is `refuse`.
    """
    choice, student = recipe.student, setup.run.student
    if choice.sanity == "off" or choice.initial == "random" or not setup.tokenizer.mask_rivals:
        return
    loader = setup.held_out or setup.loader
    score = functools.partial(_score_student, setup, loader)
    chance = frequency_nll(loader, student.model.architecture.vocabulary)
    complaint = _rival("student", setup.tokenizer, score, score(student.mask_id), chance)
    if complaint:
        _complain("student", complaint, choice.sanity)


def check_teachers(recipe: Recipe, setup: Setup) -> list[dict[str, Any]]:
    """Score every teacher on a few samples and refuse one that cannot teach. All ranks call it together.

    Returns:
        One entry per teacher: name, layout, NLL per byte and per masked token at noise level 0.3, and the
        student's per byte before its first step (None: its weights were drawn).

    Raises:
        ConfigError: on every rank alike: a teacher is no better than token frequencies, worse than the
            student, or better with another mask token, and its `sanity` is `refuse`.
    """
    report = []
    students: dict[bool, float] = {}
    for name in setup.run.teachers:
        choice = recipe.teachers[name]
        if choice.sanity == "off":
            continue
        entry, complaint = _examine(recipe, setup, name, students)
        if complaint:
            _complain(f"teachers.{name}", complaint, choice.sanity)
        report.append(entry)
    return report


def _examine(
    recipe: Recipe, setup: Setup, name: str, students: dict[bool, float]
) -> tuple[dict[str, Any], str | None]:
    """Score one teacher; return its entry of the report, and what is wrong with it.

    Args:
        recipe: the run.
        setup: its parts.
        name: the teacher's.
        students: the student's NLL per byte so far, on training data and on other; filled in.
    """
    teacher, key = setup.run.teachers[name], f"teachers.{name}"
    context = teacher.view_builder.context
    loader = _loader_for(name, setup)
    own = loader.of_teacher(name, 1 if context.kind == "bidirectional" else context.block_size)

    def score(mask_id: int) -> Score:
        scorer = TeacherScorer(teacher=teacher, group=setup.run.head.group, mask_id=mask_id)
        return _score(scorer, context, own, setup.run.device)

    mine = score(teacher.view_builder.mask_id)
    chance = frequency_nll(own, teacher.model.architecture.vocabulary)
    trained_on = loader is setup.loader
    if recipe.student.initial != "random" and trained_on not in students:
        students[trained_on] = _score_student(setup, loader, setup.run.student.mask_id).per_byte
    student = students.get(trained_on)
    log.info(
        "%s: %.3f nats a masked token at t=%.1f under %s (token frequencies alone: %.3f), %.3f a byte (the "
        "student before its first step: %s)",
        *(key, mine.per_token, TIME, context.kind, chance, mine.per_byte),
        "not scored" if student is None else f"{student:.3f}",
    )
    complaint = _rival(key, setup.tokenizers[name], score, mine, chance)
    if not complaint and not mine.per_token < chance:
        complaint = (
            f"predicts masked tokens at {mine.per_token:.3f} nats, token frequencies alone give {chance:.3f}"
        )
    if not complaint and student is not None and not mine.per_byte <= WORSE * student:
        complaint = (
            f"predicts masked text at {mine.per_byte:.3f} nats a byte, the student that it is to teach at "
            f"{student:.3f} before its first step"
        )
    entry = {
        "name": name,
        "layout": str(recipe.teachers[name].layout),
        "nll_per_token": mine.per_token,
        "nll_per_byte": mine.per_byte,
        "frequency_nll_per_token": chance,
        "student_nll_per_byte": student,
        "time": TIME,
    }
    return entry, complaint


def _complain(key: str, complaint: str, sanity: str) -> None:
    """Refuse a model, or warn of it."""
    complaint = (
        f"{key}: {complaint}; check its mask token, chat template and context.kind, or set {key}.sanity=warn"
    )
    if sanity == "refuse":
        raise ConfigError(complaint)
    if is_first():
        log.warning(complaint)


def _rival(
    key: str, tokenizer: Tokenizer, score: Callable[[int], Score], mine: Score, chance: float
) -> str | None:
    """Say that a model predicts clearly better with another special token as its mask; None: it does not."""
    tried = {token: score(token).per_token for token in tokenizer.mask_rivals}
    best = min(tried, key=lambda token: tried[token], default=None)
    if best is None or not tried[best] < min(chance, BETTER * mine.per_token):
        return None
    spelling = tokenizer.backend.special[best]
    return (
        f"predicts masked tokens at {mine.per_token:.3f} nats with the mask token "
        f"{tokenizer.special_tokens['mask_token']!r}, and at {tried[best]:.3f} with {spelling!r}: set "
        f"{key}.mask={spelling} if it was trained with that"
    )


def _score_student(setup: Setup, loader: Loader, mask_id: int) -> Score:
    """Score the student as it stands, on its own tokens. All ranks call it together."""
    student = setup.run.student
    scorer = ModelScorer(model=student.model, context=student.context, mask_id=mask_id)
    student.model.eval()
    try:
        return _score(scorer, student.context, loader, setup.run.device)
    finally:
        student.model.train()


def _score(scorer: Scorer, context: Context, loader: Loader, device: torch.device) -> Score:
    """Score a model on a few samples. All ranks call it together."""
    options = Evaluation(times=(TIME,), samples=SAMPLES, microbatch=MICROBATCH, calibration=False)
    (scores,) = evaluate(scorer, context, loader, options, device).by_time()
    return Score(per_token=scores["nll_per_token"], per_byte=scores["nll_per_byte"])


def _loader_for(name: str, setup: Setup) -> Loader:
    """Return held-out data, unless only the training data was prepared for this teacher's own tokens."""
    held_out = setup.held_out
    is_lacking = held_out is not None and name in setup.loader.sides and name not in held_out.sides
    return setup.loader if held_out is None or is_lacking else held_out


def frequency_nll(loader: Loader, vocabulary: int) -> float:
    """Return the entropy, in nats, of the maskable tokens of the first samples (add-one smoothed)."""
    batch = loader.batch_of(loader.columns.spread(COUNTED, loader.main)[:COUNTED].tolist())
    counts = torch.bincount(batch.ids[batch.maskable], minlength=vocabulary).double()
    smoothed = (counts + 1) / (counts + 1).sum()
    return float(-(counts / counts.sum() * smoothed.log()).sum())
