"""A task in a few lines: the model repeats a word; replies of a model with random weights score all sorts."""

from __future__ import annotations

import dataclasses

from tests.tiny_run import student_config, write_model
from tide_megatron import api
from tide_megatron.decode.options import Decoding
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import write_context
from tide_megatron.tasks.task import Judged, Question

DECODING = Decoding(new_tokens=4, temperature=1.0, seed=3, batch=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeat:
    """Score a reply by the share of its characters that are letters."""

    name: str = "repeat"
    number: int = 9
    longest: int = 4
    """Most words in a question."""
    decoding: Decoding = DECODING

    def questions(self):
        return [
            Question(
                name=f"word-{number}",
                messages=({"role": "user", "content": f"say {'again ' * (number % self.longest)}{number}"},),
                data={"word": str(number)},
            )
            for number in range(self.number)
        ]

    def judge(self, question, reply):
        letters = sum(letter.isalpha() for letter in reply)
        return Judged(score=float(letters > len(reply) / 3), why=f"{letters} of {len(reply)} are letters")


def write_student(folder, *, seed=1, window=None, block_size=8, **config):
    """Write a tiny model folder with tokenizer, template and context."""
    positions = {} if window is None else {"max_position_embeddings": window}
    write_model(folder, student_config(320) | positions | config, seed=seed)
    write_context(folder, Context(kind="block_diffusion", block_size=block_size))
    return folder


def evaluated(model, tasks, out, *, context=None, block_size=None, **how):
    """Evaluate a model on tasks by `api.evaluate`, on one rank in this process."""
    options = api.TaskOptions(out=out, **how)
    return api.evaluate(
        model, tasks=tasks, on_tasks=options, context=context, block_size=block_size, device="cpu"
    )
