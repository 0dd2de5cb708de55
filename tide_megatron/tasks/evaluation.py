"""`tide evaluate MODEL --tasks ...`: ask, judge, write results; the rank function of an evaluation.

What cannot work is refused before the model is opened: unknown tasks, data that are not here, a tokenizer
without a template, another model's folder. Then task by task: answers as they come, scores, the task's
result; at the end all results of the folder, and a table of them.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.files import write_text
from tide_megatron.base.lease import LEASE, leased
from tide_megatron.base.read import json_of
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.decoder import Decoder
from tide_megatron.decode.opening import open_decoder
from tide_megatron.decode.options import Decoding
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.likelihood import scored_samples
from tide_megatron.evaluate.options import Arithmetic
from tide_megatron.parallel.collectives import fail_together, held_by_first, is_first
from tide_megatron.tasks import find_task
from tide_megatron.tasks.folder import (
    ASKED,
    MODEL,
    RESULT,
    SCORES,
    TABLE,
    claim,
    deciding,
    model_facts,
    questions_digest,
    scores_of,
    write_json,
)
from tide_megatron.tasks.page import markdown, tables
from tide_megatron.tasks.prompts import Prompts, Think
from tide_megatron.tasks.runner import ask, counts_of, prepare
from tide_megatron.tasks.scores import MeanScore, compare
from tide_megatron.tasks.suite import Entry, Suite
from tide_megatron.tasks.task import Task

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """What is evaluated, and how."""

    suite: Suite
    out: Path
    """Folder of results."""
    limit: int | None = None
    """Most questions of a task (of each of a group's): a fixed draw; a larger one contains a smaller."""
    decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Decoding` that have the last word over tasks and suites."""
    think: Think = "auto"
    draws: int = 32
    """Maskings of each continuation whose likelihood is estimated."""
    include: Path | None = None
    """Folder of tasks in lm-evaluation-harness's own form."""
    unsandboxed: tuple[str, ...] = ()
    """Tasks that may run generated code without the sandbox; the harness's do so in this process."""
    against: Path | None = None
    """Another folder of results, to compare with question by question."""

    def chosen(self, questions: int) -> list[int]:
        """Return which of a task's questions are asked, ascending."""
        if self.limit is None:
            return list(range(questions))
        return sorted(scored_samples(numpy.zeros(questions, dtype=numpy.int64), self.limit))


def evaluate_tasks(
    model: Path,
    options: TaskEvaluation,
    context: Context | None = None,
    arithmetic: Arithmetic | None = None,
    *,
    device: Device,
    stop: StopFlag,
) -> dict[str, Any]:
    """Evaluate a model on tasks; a rank function for `run_ranks`.

    Every rank holds the whole model and answers its share of each task. All ranks call it together.

    Args:
        model: a run's folder, one of its checkpoints, or a model folder.
        options: what, and how.
        context: in which the model was trained; None: its folder's.
        arithmetic: see `open_model`.
        device: where to compute.
        stop: a signal unwinds it; what is written stays, and the same call goes on.

    Returns:
        `tasks`: each one's result, as the folder's result.json has it; `compared`: differences to the other
        folder by task, None where there is none.

    Raises:
        TideError: an unknown task, data or a model that are not here, or a folder of other answers.
    """
    with fail_together():
        tasks = _own_tasks(options)
        harness = _harness_tasks(options)
        other = None if options.against is None else scores_of(options.against)
    with held_by_first(lambda: leased(options.out / LEASE, f"--out: {options.out}", ConfigError, stop=stop)):
        decoder = open_decoder(model, device, arithmetic, context=context)
        with fail_together():
            prompts = Prompts(tokenizer=decoder.tokenizer, window=decoder.window, think=options.think)
            if is_first():
                facts = {**model_facts(decoder, arithmetic), "empty_think_block": prompts.thinks}
                claim(options.out / MODEL, facts, "model")
        _tell_block(options.suite, decoder)
        evaluator = _Evaluator(options=options, decoder=decoder, prompts=prompts)
        results = {}
        for entry in options.suite.entries:
            if entry.is_harness:
                results[entry.name] = evaluator.harness_result(entry, harness[entry.name])
            else:
                results[entry.name] = evaluator.own_result(entry, tasks[entry.name])
        with fail_together():
            compared = None if other is None else compared_with(options.out, other, list(results))
            found = {"tasks": results, "compared": compared}
            if is_first():
                write_json(options.out / RESULT, {"tasks": all_results(options.out), "compared": compared})
                shown, lines = tables(found, options.suite, str(options.against))
                write_text(options.out / TABLE, markdown(shown, lines))
    return found


def compared_with(
    folder: Path, other: Mapping[str, Mapping[str, float]], names: Sequence[str]
) -> dict[str, Any]:
    """Compare tasks of a folder of results with another one's.

    Args:
        folder: of results.
        other: task -> question -> score of the other one.
        names: of the tasks; those that the other one lacks are left out.

    Raises:
        DataError: the two have no question of a task in common.
    """
    own = scores_of(folder)
    return {name: compare(own[name], other[name]).summary() for name in names if name in other}


def all_results(folder: Path) -> dict[str, Any]:
    """Return the results of all tasks that were evaluated into a folder."""
    return {file.parent.name: json_of(file) for file in sorted(folder.glob(f"*/{RESULT}"))}


def _own_tasks(options: TaskEvaluation) -> dict[str, Task]:
    """Make the tasks of this package, by the names of their entries, and see that their data are here.

    Raises:
        TideError: an unknown task, or one whose data are not here.
    """
    tasks = {
        entry.name: find_task(entry.task, is_unsandboxed=entry.name in options.unsandboxed)
        for entry in options.suite.entries
        if not entry.is_harness
    }
    for task in tasks.values():
        task.questions()
    return tasks


def _harness_tasks(options: TaskEvaluation) -> dict[str, Any]:
    """Load the tasks of lm-evaluation-harness, by the names of their entries.

    Raises:
        TideError: the harness is not installed, or a task that cannot be had.
    """
    entries = [entry for entry in options.suite.entries if entry.is_harness]
    if not entries:
        return {}
    try:
        from tide_megatron.tasks.harness.loading import load_harness_tasks
    except ModuleNotFoundError as fault:
        if (fault.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ConfigError(
            f"--tasks: {entries[0].name!r} is no task of this package, and lm-evaluation-harness, which may "
            "have it, is not installed: pip install 'tide-megatron[eval]'"
        ) from None
    loaded = load_harness_tasks(entries, options.include, options.unsandboxed)
    return {task.entry.name: task for task in loaded}


def _tell_block(suite: Suite, decoder: Decoder) -> None:
    """Say where a suite's protocol has another block than the model was trained with."""
    if suite.block_size is not None and decoder.block != suite.block_size:
        log.warning(
            "the suite's protocol has blocks of %d tokens, this model was trained with %s: its own are used",
            suite.block_size,
            decoder.block or "none",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Evaluator:
    """One model under evaluation."""

    options: TaskEvaluation
    decoder: Decoder
    prompts: Prompts

    def own_result(self, entry: Entry, task: Task) -> dict[str, Any]:
        """Evaluate a task of this package. All ranks call it together."""
        folder, began = self.options.out / entry.name, time.monotonic()
        with fail_together():
            questions = task.questions()
            decoding = entry.decoded(task.decoding, self.options.decoding)
            asked = prepare(task, self.options.chosen(len(questions)), decoding, self.prompts)
            facts = {"task": entry.task, "questions": questions_digest(questions)}
            self._claim(folder, facts, dataclasses.asdict(decoding))
        answers = ask(task, asked, decoding, self.decoder, self.prompts, folder)
        scores = {name: float(answer["score"]) for name, answer in answers.items()}
        more = {"of_questions": len(questions), **counts_of(answers)}
        return self._written(folder, scores, dataclasses.asdict(decoding), began, more)

    def harness_result(self, entry: Entry, task: Any) -> dict[str, Any]:
        """Evaluate a task of lm-evaluation-harness. All ranks call it together."""
        from tide_megatron.tasks.harness.run import ask_harness, likelihood_facts

        folder, began, draws = self.options.out / entry.name, time.monotonic(), self.options.draws
        with fail_together():
            given = {**entry.decoding, **self.options.decoding}
            entry.decoded(Decoding(), self.options.decoding)  # refuses what cannot be
            facts = {"task": entry.task, "shots": entry.shots, "draws": draws}
            self._claim(folder, facts, given)
        found = ask_harness(
            task, self.decoder, self.prompts, given, folder, limit=self.options.limit, draws=draws
        )
        replies = {name: answer for name, answer in found.answers.items() if "room" in answer}
        more = {
            "metric": task.metric,
            "filter": task.filter,
            "shots": entry.shots,
            **counts_of(replies),
            "likelihood": likelihood_facts(found.choices, draws),
            "cut_contexts": sum(bool(answer.get("is_cut")) for answer in found.answers.values()),
            "lm_eval": found.report,
        }
        return self._written(folder, found.scores, given, began, more)

    def _claim(self, folder: Path, facts: Mapping[str, Any], decoding: Mapping[str, Any]) -> None:
        """Write down what decides the answers of a task, on the first rank."""
        if is_first():
            claim(folder / ASKED, {**facts, "decoding": deciding(decoding)}, "task or of other options")

    def _written(
        self,
        folder: Path,
        scores: Mapping[str, float],
        decoding: Mapping[str, Any],
        began: float,
        more: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write scores and result of a task on the first rank, and return the result."""
        score = MeanScore.of(list(scores.values()))
        result = {
            "score": score.mean,
            "interval": [score.low, score.high],
            "questions": score.questions,
            "seconds_of_this_start": round(time.monotonic() - began, 2),
            "window": self.decoder.window,
            "decoding": dict(decoding),
            **more,
        }
        with fail_together():
            if is_first():
                write_json(folder / SCORES, scores)
                write_json(folder / RESULT, result)
                log.info("%s: %s %% of %d questions", folder.name, score.percent(), score.questions)
        return result
