"""How far the ranks have come with a task: a line in the log now and then, with rate and time to the end."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from tide_megatron.base.units import in_time
from tide_megatron.parallel.collectives import is_first
from tide_megatron.tasks.answers import count_answers

log = logging.getLogger(__name__)
EVERY_SECONDS = 10.0


class AnswerProgress:
    """Counts what all ranks have written into a folder of answers; only the first rank speaks."""

    def __init__(self, name: str, folder: Path, total: int, done: int) -> None:
        """Begin with answers of earlier starts.

        Args:
            name: of the task.
            folder: of its answers.
            total: questions.
            done: how many of them have been answered.
        """
        self._name, self._folder, self._total = name, folder, total
        self._before = count_answers(folder) - done  # lines of questions that are not asked now
        self._done, self._began = done, time.monotonic()
        self._told = self._began
        if done:
            log.info("%s: going on, %d of %d questions are answered", name, done, total)
        else:
            log.info("%s: %d questions", name, total)

    def tell(self) -> None:
        """Say how far it is, if the last word is some seconds old. Not a collective."""
        now = time.monotonic()
        if now - self._told < EVERY_SECONDS or not is_first():
            return
        self._told = now
        answered = count_answers(self._folder) - self._before
        rate = (answered - self._done) / (now - self._began)
        left = (self._total - answered) / rate if rate > 0 else None
        log.info(
            "%s: %d of %d questions, %.3g a minute%s",
            self._name,
            answered,
            self._total,
            60 * rate,
            "" if left is None else f", {in_time(left)} to go",
        )
