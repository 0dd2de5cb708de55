"""What a task is: questions for a model, and a judge of its replies.

A new task is one file with a class that does what `Task` says, and one line of `TASKS` (`tasks/__init__.py`).
Whoever asks a model (`tide evaluate --tasks`, a run that evaluates while it trains) knows tasks only by this
protocol: it decodes `Question.messages` under `Task.decoding`, and gives replies to `judge_all`. A judge sees
the question and the text of the reply, never a model, so replies that were written down can be judged later
and elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tide_megatron.decode.options import Decoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What a model is asked."""

    name: str
    """Names it within its task, the same on every machine and in every run: results are resumed by it."""
    messages: tuple[Mapping[str, str], ...]
    """The chat so far, as {"role", "content"}; the model writes the assistant's next message."""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the judge needs beside the reply; JSON values."""
    prefix: str = ""
    """How the reply begins: encoded behind the generation prompt, no part of the reply that is judged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What a reply is worth."""

    score: float
    """1.0 right, 0.0 wrong; a share in between where a task has parts."""
    why: str
    """In a few words, for a person who reads results: `passed`, an exception's line, `10 s of time`."""


class Task(Protocol):
    """Questions, how they are decoded, and a judge. Frozen dataclasses do well."""

    @property
    def name(self) -> str:
        """Name it in `--tasks`, in results and in messages."""

    @property
    def decoding(self) -> Decoding:
        """How long replies are, and how they are written where the user says nothing else."""

    def questions(self) -> list[Question]:
        """Return all questions, in one order everywhere.

        Raises:
            DataError: its data are not here; names what to install or download.
        """

    def judge(self, question: Question, reply: str) -> Judged:
        """Judge one reply.

        Args:
            question: one of `questions`.
            reply: what the model wrote behind `question.prefix`, stop strings and special tokens cut off.
        """


@runtime_checkable
class JudgesMany(Protocol):
    """A task that judges many replies faster than one after the other, because it runs programs."""

    def judge_all(self, pairs: Sequence[tuple[Question, str]]) -> list[Judged]:
        """Judge replies as `Task.judge` would, in the order given."""


def judge_all(task: Task, pairs: Sequence[tuple[Question, str]]) -> list[Judged]:
    """Judge replies, many at once where the task can.

    Args:
        task: whose questions they answer.
        pairs: (question, reply).

    Returns:
        One for each pair, in order.
    """
    if isinstance(task, JudgesMany):
        return task.judge_all(pairs)
    return [task.judge(question, reply) for question, reply in pairs]
