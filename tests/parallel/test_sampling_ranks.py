"""A file of replies is the same from any number of ranks, also where they change between two starts."""

import pytest

from tests.tiny_run import student_config, write_model
from tests.unit.models.shapes import CPU
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.conversations import conversation
from tide_megatron.decode.options import Decoding
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import write_context
from tide_megatron.tasks import sampling
from tide_megatron.tasks.sampling import Sampling, sample_conversations

ASKED = [conversation("word " * (number % 3 + 1) + str(number)) for number in range(9)]


class Cut(Exception):
    """A rank that is killed."""


def go(model, out, writes=None, seed=0):
    """Sample on this rank; die at a write, or return the replies' text or what was refused."""
    add, done = sampling.AnswerFile.add, []

    def dying(self, answers):
        if len(done) == writes:
            raise Cut
        done.append(answers)
        add(self, answers)

    sampling.AnswerFile.add = dying
    work = Sampling(
        conversations=ASKED, options=Decoding(new_tokens=8, temperature=1.0, batch=2, seed=seed), out=out
    )
    try:
        return [one.reply.text for one in sample_conversations(model, work, device=CPU, stop=StopFlag())]
    except (ConfigError, Cut, RuntimeError) as fault:
        return type(fault).__name__
    finally:
        sampling.AnswerFile.add = add


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "student", student_config(320), seed=1)
    write_context(folder, Context(kind="block_causal", block_size=4))
    return folder


def test_ranks_and_kills_change_nothing(pool, model, tmp_path):
    one, two, parted = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "parted"))
    (texts,) = pool(1).run(go, model, one)
    assert pool(2).run(go, model, two) == [texts, texts]
    assert two.read_bytes() == one.read_bytes()
    assert len(set(texts)) > 1
    assert "Cut" in pool(2).run(go, model, parted, 1)
    kept = list((tmp_path / ".parted.jsonl.partial").glob("answers-*.jsonl"))
    assert sum(file.read_text().count("\n") for file in kept) == 4, "a batch of each rank"
    assert pool(1).run(go, model, parted) == [texts]
    assert parted.read_bytes() == one.read_bytes()
    assert pool(2).run(go, model, one, None, 7) == ["ConfigError"] * 2
