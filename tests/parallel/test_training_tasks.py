"""Tasks in training: asked on all ranks, told everywhere, and training is bit for bit what it was."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.test_resume import losses, run
from tests.tiny_run import write_tiny_run
from tide_megatron import tasks
from tide_megatron.base.errors import TideError
from tide_megatron.checkpoint.retention import Mark, listed
from tide_megatron.decode.options import Decoding
from tide_megatron.tasks.task import Judged, Question

WORDS = [
    *("evaluation.tasks=[letters]", "evaluation.task_every=2", "evaluation.questions=5", "steps=6"),
    *("evaluation.prompts=[Say hello.]", "evaluation.shown=1", "evaluation.at_start=true"),
    *("evaluation.decoding={new_tokens: 8}", "checkpoints.keep_best=tasks/letters", "checkpoints.keep=1"),
]


@dataclasses.dataclass(frozen=True)
class Letters:
    """Seven questions; a reply's score is the share of its characters that are letters."""

    name: str = "letters"
    decoding: Decoding = dataclasses.field(
        default_factory=lambda: Decoding(new_tokens=16, temperature=1.0, batch=3)
    )

    def questions(self):
        ask = ({"role": "user", "content": f"Write letters{'!' * number}"} for number in range(7))
        return [Question(name=f"q{number}", messages=(one,)) for number, one in enumerate(ask)]

    def judge(self, question, reply):
        share = sum(character.isalpha() for character in reply) / max(1, len(reply))
        return Judged(score=share, why=f"{len(reply)} characters")


def run_asking(*args):
    """Train on this rank with a task that only this test knows; return the result, or the fault."""
    tasks.TASKS["letters"] = Letters
    try:
        return run(*args)
    except TideError as fault:
        return str(fault)
    finally:
        del tasks.TASKS["letters"]


def asked(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "time"}
        for line in lines
        if line["kind"] == "tasks"
    ]


def replies(folder, step):
    return [json.loads(line) for line in (folder / f"replies/step-{step:08d}.jsonl").read_text().splitlines()]


def test_a_run_that_asks_trains_as_one_that_does_not(pool, tmp_path):
    tiny = write_tiny_run(tmp_path / "tiny")
    plain, asking, parted = tmp_path / "plain", tmp_path / "asking", tmp_path / "parted"
    pool(2).run(run, tiny, plain, 2, 1000, 1, ["steps=6"])
    result = pool(2).run(run_asking, tiny, asking, 2, 1000, 1, WORDS)[0]
    assert losses(asking) == losses(plain)
    one, other = (load_file(folder / "model/model.safetensors") for folder in (plain, asking))
    assert all(torch.equal(one[name], other[name]) for name in one)

    told = asked(asking)
    assert [line["step"] for line in told] == [0, 2, 4, 6]
    for line in told:
        whole = replies(asking, line["step"])
        judged = [reply for reply in whole if reply["task"] == "letters"]
        assert len(judged) == 5, "a fixed draw"
        assert line["letters"] == pytest.approx(sum(reply["score"] for reply in judged) / 5)
        assert [reply["question"] for reply in line["replies"]] == [judged[0]["question"], "0"]
        assert line["replies"][1] in whole
        shown = line["replies"][1] | {"reply": "", "why": ""}
        assert shown == {
            **{"task": "prompts", "question": "0", "prompt": "Say hello.", "score": None},
            **{"reply": "", "why": ""},
        }
    draws = [[reply["question"] for reply in replies(asking, step)] for step in (0, 2, 4, 6)]
    assert draws == [draws[0]] * 4
    assert result["tasks"] == {"letters": told[-1]["letters"]}
    log = (asking / "run.log").read_text()
    assert f"step 6: tasks  letters {told[-1]['letters']:.1%}" in log
    assert re.search(r"prompts 0 \((eos|length)\): 'Say hello.' -> ", log)

    scores = {line["step"]: line["letters"] for line in told if line["step"]}
    best = max(scores, key=lambda step: (scores[step], step))
    kept = listed(asking / "checkpoints")
    assert {Mark.of(path).step for path in kept} == {best, 6}
    assert (asking / "checkpoints/best").read_text().strip() in [path.name for path in kept]

    stopped = pool(2).run(run_asking, tiny, parted, 2, 3, 1, WORDS)[0]
    assert stopped["clock"]["step"] == 4
    pool(2).run(run_asking, tiny, parted, 2, 1000, 999, WORDS)
    assert [line for line in asked(parted) if line["step"] != 4] == [
        line for line in told if line["step"] != 4
    ]


def test_two_ranks_reply_what_one_does(pool, tmp_path):
    tiny, found = write_tiny_run(tmp_path / "tiny"), []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        pool(ranks).run(run_asking, tiny, folder, ranks, 0, 1, WORDS)  # asked at the start, and stopped
        found.append(replies(folder, 0))
    assert found[0] == found[1]
    assert len({reply["reply"] for reply in found[0]}) > 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("evaluation.tasks=[leters]", "evaluation.tasks: 'leters' is unknown; did you mean 'letters'?"),
        ("evaluation.tasks=[letters,letters]", "evaluation.tasks: letters, letters names one twice"),
        ("evaluation.decoding={new_token: 3}", "evaluation.decoding.new_token"),
        ("checkpoints.keep_best=tasks/sums", "checkpoints.keep_best: 'tasks/sums' is no score of this run"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_the_start(pool, tmp_path, word, said):
    tiny = write_tiny_run(tmp_path / "tiny")
    told = pool(2).run(run_asking, tiny, tmp_path / "run", 2, 1000, 1, [*WORDS, word])
    assert all(said in one for one in told), told
    assert not (tmp_path / "run").exists()
