"""What a run does besides held-out scores, now and then: tasks and prompts for the student under training."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.options import STRICT
from tide_megatron.evaluate.options import Evaluation

Word = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunEvaluation(Evaluation):
    """Scores of the student under training; they never change training."""

    tasks: tuple[Word, ...] = ()
    """Tasks of this package that it is asked (docs/evaluation.md); scored by their judges."""
    task_every: int = Field(default=0, ge=0)
    """Updates between them; 0: only at the end."""
    questions: int = Field(default=32, ge=1)
    """Most questions of a task: a fixed draw, dealt over the ranks; at most all of them."""
    prompts: tuple[Word, ...] = ()
    """Prompts that it replies to each time, for a person to read."""
    decoding: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Decoding options (docs/decoding.md) in the place of the tasks' own, such as `{new_tokens: 64}`."""
    shown: int = Field(default=2, ge=0)
    """Replies of each task that are shown in the log, TensorBoard, wandb and metrics.jsonl; all of them, and
    those to `prompts`, are in the run folder (replies/)."""

    @property
    def asks(self) -> bool:
        """Whether the student is asked anything."""
        return bool(self.tasks or self.prompts)
