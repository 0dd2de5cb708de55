"""Ask a model a task of lm-evaluation-harness, and return each question's score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from lm_eval import simple_evaluate

from tide_megatron.base.errors import ConfigError
from tide_megatron.decode.decoder import Decoder
from tide_megatron.evaluate.likelihood import scored_samples
from tide_megatron.parallel.collectives import broadcast_object, gather_objects
from tide_megatron.tasks.answers import Answer
from tide_megatron.tasks.harness.language_model import HarnessModel, digest
from tide_megatron.tasks.harness.loading import HarnessTask
from tide_megatron.tasks.prompts import Prompts

_REPORTED = ("results", "groups", "versions", "n-shot", "n-samples")
"""Of the harness's own results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """What a task of the harness came to; the same on every rank."""

    scores: dict[str, float]
    """Question -> score; a question is TASK/number of its document."""
    answers: dict[str, Answer]
    """What the model was asked, by digest."""
    choices: dict[str, list[tuple[float, float]]]
    """Question of a multiple choice -> (likelihood, standard error) of each choice."""
    report: dict[str, Any]
    """The harness's own results, without samples."""


def ask_harness(
    task: HarnessTask,
    decoder: Decoder,
    prompts: Prompts,
    decoding: Mapping[str, Any],
    folder: Path,
    *,
    limit: int | None,
    draws: int,
) -> HarnessResult:
    """Answer what is not answered yet, and let the harness judge everything. All ranks call it together.

    Args:
        task: loaded.
        decoder: the whole model on this rank.
        prompts: how it is asked.
        decoding: fields of `Decoding` that have the last word.
        folder: of the task's answers; every rank sees it.
        limit: most documents of each of its tasks: a fixed draw; None: all.
        draws: maskings of each continuation whose likelihood is estimated.

    Raises:
        ConfigError: the metric gives no number for each question.
    """
    model = HarnessModel(decoder, prompts, decoding, draws=draws, folder=folder)
    found = simple_evaluate(
        model=model,
        tasks=[task.loaded],
        task_manager=task.manager,
        num_fewshot=task.entry.shots,
        samples=_drawn(task, limit),
        bootstrap_iters=0,  # intervals are ours
        apply_chat_template=True,
        log_samples=True,
        confirm_run_unsafe_code=True,  # `load_harness_tasks` has asked
    )
    answers = {name: answer for part in gather_objects(model.answers) for name, answer in part.items()}
    share: tuple[Any, ...] | None = None
    if found is not None:
        samples = {
            f"{name}/{sample['doc_id']}": sample
            for name, leaf in sorted(found["samples"].items())
            for sample in sorted(leaf, key=lambda sample: int(sample["doc_id"]))
            if sample["filter"] == task.filter
        }
        scores = {name: _score(task, sample) for name, sample in samples.items()}
        likelihoods = {name: _likelihoods(sample, answers) for name, sample in samples.items()}
        choices = {name: pairs for name, pairs in likelihoods.items() if len(pairs) > 1}
        report = {key: found[key] for key in _REPORTED if key in found}
        share = scores, choices, report
    scores, choices, report = broadcast_object(share)
    return HarnessResult(scores=scores, answers=answers, choices=choices, report=report)


def _likelihoods(sample: Mapping[str, Any], answers: Mapping[str, Answer]) -> list[tuple[float, float]]:
    """Return (likelihood, standard error) of each choice of a question; none where it has no choices."""
    asked = [answers.get(digest(*arguments)) for arguments in sample["arguments"]]
    return [(one["value"], one["standard_error"]) for one in asked if one is not None and "value" in one]


def likelihood_facts(choices: Mapping[str, list[tuple[float, float]]], draws: int) -> dict[str, Any] | None:
    """Say how sure multiple choices are, given the variance of their likelihoods; None: there are none.

    Args:
        choices: of a `HarnessResult`.
        draws: maskings of each continuation.
    """
    if not choices:
        return None
    errors = [error for pairs in choices.values() for _, error in pairs]
    unsure = 0
    for pairs in choices.values():
        (best, one), (second, other) = sorted(pairs, reverse=True)[:2]
        unsure += best - second < 2 * math.hypot(one, other)
    return {
        "draws": draws,
        "standard_error": math.fsum(errors) / len(errors),
        "variance": math.fsum(error**2 for error in errors) / len(errors),
        "unsure_share": unsure / len(choices),
    }


def _drawn(task: HarnessTask, limit: int | None) -> dict[str, list[int]] | None:
    """Return which documents of each task are asked: the beginning of one fixed order, ascending."""
    if limit is None:
        return None
    found = {}
    for name, leaf in task.leaves.items():
        sources = numpy.zeros(len(leaf.eval_docs), dtype=numpy.int64)
        found[name] = sorted(scored_samples(sources, limit))
    return found


def _score(task: HarnessTask, sample: Mapping[str, Any]) -> float:
    value = sample[task.metric]
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"--tasks: metric {task.metric!r} of {task.entry.harness_name} is no number for each question; "
            "name another metric in a suite file"
        ) from None
