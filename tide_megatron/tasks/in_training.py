"""Tasks and prompts for a student under training: asked on all ranks, between two updates.

Questions, their order and their draws are fixed, so two moments of a run, or two runs, are asked the same; a
run that goes on asks again what it asked. The model is read without gradients and handed back as it was, and
nothing is drawn from torch's generators, so training is bit for bit what it would be without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from tide_megatron.base.errors import ConfigError, under
from tide_megatron.base.heartbeat import HEARTBEAT
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.decoder import Decoder
from tide_megatron.decode.denoise import OnBlock
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.reply import Reply
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.likelihood import scored_samples
from tide_megatron.models.build import TideModel
from tide_megatron.parallel.collectives import fail_together, gather_objects, own_share
from tide_megatron.tasks import find_task
from tide_megatron.tasks.options import RunEvaluation
from tide_megatron.tasks.prompts import Prompts
from tide_megatron.tasks.runner import OpenQuestion, decode_all, longest_first, prepare
from tide_megatron.tasks.suite import Entry
from tide_megatron.tasks.task import Judged, Question, Task, judge_all
from tide_megatron.text.tokenizer import Tokenizer

PROMPTS = "prompts"
"""Stands for the recipe's own prompts where tasks have their names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """One reply of the student."""

    task: str
    """Of `evaluation.tasks`, or `PROMPTS`."""
    question: str
    """Its name within the task."""
    prompt: str
    """The user's last message."""
    reply: str
    score: float | None
    """None: of a prompt, which nobody judges."""
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prompted:
    """The recipe's prompts, in the form of a task."""

    prompts: tuple[str, ...]
    decoding: Decoding = Decoding()  # noqa: RUF009 - frozen
    name: str = PROMPTS

    def questions(self) -> list[Question]:
        """Return them."""
        return [
            Question(name=f"{number}", messages=({"role": "user", "content": prompt},))
            for number, prompt in enumerate(self.prompts)
        ]

    def judge(self, question: Question, reply: str) -> Judged:
        """Give no opinion."""
        return Judged(score=0.0, why="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ready:
    """One task, as this student reads it."""

    task: Task
    decoding: Decoding
    asked: Sequence[OpenQuestion]
    questions: Mapping[str, Question]


class _Beating(Decoder):
    """A decoder that shows with every block that this rank lives."""

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        options: Decoding,
        *,
        numbers: Sequence[int] | None = None,
        on_block: OnBlock | None = None,
        stop: StopFlag | None = None,
    ) -> list[Reply]:
        """Reply to prompts, as `Decoder.decode`."""

        def beat(number: int, reply: Reply) -> None:
            HEARTBEAT.beat("evaluate")
            if on_block is not None:
                on_block(number, reply)

        return super().decode(prompts, options, numbers=numbers, on_block=beat, stop=stop)


class TrainingTasks:
    """What a run asks its student."""

    def __init__(self, options: RunEvaluation, tokenizer: Tokenizer, window: int) -> None:
        """Read tasks and turn their questions into tokens. Not a collective.

        Args:
            options: of the recipe.
            tokenizer: the student's.
            window: positions that it was made for.

        Raises:
            TideError: an unknown task, data that are not here, decoding options that cannot be, a student
                without a chat template.
        """
        self._tokenizer = tokenizer
        with under("evaluation"):
            if len(set(options.tasks)) < len(options.tasks):
                raise ConfigError(f"tasks: {', '.join(options.tasks)} names one twice; name it once")
            tasks = [find_task(name) for name in options.tasks]
            self._prompts = Prompts(tokenizer=tokenizer, window=window)
            tasks += [_Prompted(prompts=options.prompts)] if options.prompts else []
            self._ready = [self._prepared(task, options) for task in tasks]

    def _prepared(self, task: Task, options: RunEvaluation) -> _Ready:
        questions = task.questions()
        numbers = list(range(len(questions)))
        if task.name != PROMPTS:
            one_source = numpy.zeros(len(questions), dtype=numpy.int64)
            numbers = sorted(scored_samples(one_source, options.questions))
        entry = Entry(name=task.name, task=task.name)
        decoding = entry.decoded(task.decoding, options.decoding)
        asked = prepare(task, numbers, decoding, self._prompts)
        named = {question.name: question for question in questions}
        return _Ready(task=task, decoding=decoding, asked=asked, questions=named)

    def ask(self, model: TideModel, context: Context) -> list[Answered]:
        """Ask everything. All ranks call it together, with equal weights; each answers its share.

        Args:
            model: the student, whole on this rank.
            context: in which it is trained.

        Returns:
            The replies in the order of tasks and questions, the same on every rank.

        Raises:
            TideError: a judge's fault, on every rank.
        """
        decoder = _Beating(model, self._tokenizer, context)
        return [answer for ready in self._ready for answer in self._answers(ready, decoder)]

    def _answers(self, ready: _Ready, decoder: Decoder) -> list[Answered]:
        """Answer one task's questions. All ranks call it together."""
        rank, ranks = own_share()
        own: list[dict[str, Any]] = []
        with fail_together():
            share = longest_first(ready.asked)[rank::ranks]
            decode_all(share, ready.decoding, decoder, self._prompts, own.extend)
            judged = self._judged(ready, own)
        found = {answer.question: answer for of_rank in gather_objects(judged) for answer in of_rank}
        return [found[one.name] for one in ready.asked]

    def _judged(self, ready: _Ready, replies: Sequence[Mapping[str, Any]]) -> list[Answered]:
        questions, is_judged = ready.questions, ready.task.name != PROMPTS
        pairs = [(questions[one["name"]], str(one["reply"])) for one in replies if one["room"]]
        verdicts = iter(judge_all(ready.task, pairs) if is_judged else [])
        found = []
        for one in replies:
            verdict = Judged(score=0.0, why=self._prompts.no_room(one["prompt_tokens"]))
            if one["room"] and is_judged:
                verdict = next(verdicts)
            found.append(
                Answered(
                    task=ready.task.name,
                    question=one["name"],
                    prompt=questions[one["name"]].messages[-1]["content"],
                    reply=str(one["reply"]),
                    score=verdict.score if is_judged else None,
                    why=verdict.why if is_judged else str(one["ended"]),
                )
            )
        return found


def task_scores(answers: Sequence[Answered]) -> dict[str, float]:
    """Return the mean score of each task, by its name."""
    by_task: dict[str, list[float]] = {}
    for answer in answers:
        if answer.score is not None:
            by_task.setdefault(answer.task, []).append(answer.score)
    return {name: sum(scores) / len(scores) for name, scores in by_task.items()}


def shown_answers(answers: Sequence[Answered], most: int) -> list[Answered]:
    """Return the first so many answers of each task, and all to prompts."""
    seen: dict[str, int] = {}
    shown = []
    for answer in answers:
        seen[answer.task] = seen.get(answer.task, 0) + 1
        if answer.task == PROMPTS or seen[answer.task] <= most:
            shown.append(answer)
    return shown
