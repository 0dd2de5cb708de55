"""A task whose replies are programs: the sandbox they run in, and how many are judged at once."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field

from tide_megatron.tasks.sandbox.options import Isolation, Limits
from tide_megatron.tasks.sandbox.sandbox import Sandbox, at_once, workers_here
from tide_megatron.tasks.task import Judged, Question


@dataclass(frozen=True, kw_only=True)
class ProgramTask(abc.ABC):
    """Judges programs that a model wrote; a task says which program a reply is, and what makes it right."""

    isolation: Isolation = "auto"
    limits: Limits = field(default_factory=Limits)
    workers: int | None = None
    """Replies judged at once; None: this rank's share of the machine's cores."""

    @abc.abstractmethod
    def program(self, question: Question, reply: str) -> str:
        """Return the program that a reply means."""

    @abc.abstractmethod
    def verdict(self, sandbox: Sandbox, question: Question, program: str) -> Judged:
        """Run a program and judge it; called from several threads.

        Raises:
            SandboxError: programs cannot be run here as asked.
        """

    def judge(self, question: Question, reply: str) -> Judged:
        """Judge the program that a reply means.

        Raises:
            SandboxError: programs cannot be run here as asked.
        """
        return self.judge_all([(question, reply)])[0]

    def judge_all(self, pairs: Sequence[tuple[Question, str]]) -> list[Judged]:
        """Judge replies, several at once.

        Raises:
            SandboxError: as `judge`.
        """
        sandbox = Sandbox(self.isolation, self.limits)
        programs = [(question, self.program(question, reply)) for question, reply in pairs]
        return at_once(lambda one: self.verdict(sandbox, *one), programs, self.workers or workers_here())
