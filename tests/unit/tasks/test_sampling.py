"""Replies in a file: whole or going on, the same after a kill, and never those of another work."""

import dataclasses
import json

import pytest

from tests.tiny_run import student_config, write_model
from tests.unit.models.conftest import groups  # noqa: F401 - the fixture
from tests.unit.models.shapes import CPU
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.conversations import Conversation, conversation
from tide_megatron.decode.options import Decoding
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import write_context
from tide_megatron.tasks import sampling
from tide_megatron.tasks.sampling import Sampling, sample_conversations

pytestmark = pytest.mark.usefixtures("groups")
OPTIONS = Decoding(new_tokens=12, temperature=1.0, batch=2)
ASKED = [
    Conversation(messages=conversation("word " * (number % 3 + 1) + str(number)).messages, id=f"q{number}")
    for number in range(7)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(
        tmp_path_factory.mktemp("model") / "student",
        student_config(320) | {"max_position_embeddings": 96},
        seed=1,
    )
    write_context(folder, Context(kind="block_causal", block_size=4))
    return folder


def go(model, out, asked=ASKED, options=OPTIONS, stop=None):
    work = Sampling(conversations=asked, options=options, out=out)
    return sample_conversations(model, work, device=CPU, stop=stop or StopFlag())


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_has_what_is_returned_without_one(model, tmp_path):
    out = tmp_path / "made" / "replies.jsonl"
    plain, written = go(model, None), go(model, out)
    assert written == plain
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["number"] for record in records] == list(range(7))
    for record, one in zip(records, plain, strict=True):
        assert record["id"] == one.conversation.id
        assert record["messages"] == list(one.messages)
        assert record["reply"] == one.reply.text
        assert (tuple(record["tokens"]), tuple(record["order"])) == (one.reply.ids, one.reply.order)
        assert (record["ended"], record["forwards"]) == (one.reply.ended, one.reply.forwards)
    assert len({record["reply"] for record in records}) > 1
    assert left(out.parent) == ["replies.jsonl", "replies.jsonl.about.json"]
    before = out.stat().st_mtime_ns
    assert go(model, out, options=dataclasses.replace(OPTIONS, batch=3)) == plain, "batch is no other work"
    assert out.stat().st_mtime_ns == before


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_kill_costs_what_was_under_way(model, tmp_path, monkeypatch, writes):
    expected = tmp_path / "expected.jsonl"
    go(model, expected)
    out, add, done = tmp_path / "replies.jsonl", sampling.AnswerFile.add, []

    class Killed(Exception):
        pass

    def dying(self, answers):
        if len(done) == writes:
            raise Killed
        done.append([answer["name"] for answer in answers])
        add(self, answers)

    with monkeypatch.context() as patched:
        patched.setattr(sampling.AnswerFile, "add", dying)
        with pytest.raises(Killed):
            go(model, out)
    assert not out.exists()
    kept = [name for names in done for name in names]
    answers = tmp_path / ".replies.jsonl.partial" / "answers-0000.jsonl"
    if writes:
        answers.write_bytes(answers.read_bytes() + b'{"name": "0000')  # and a line that was cut
    asked = []
    decode = sampling.Decoder.decode

    def counting(self, prompts, options, **more):
        asked.extend(more["numbers"])
        return decode(self, prompts, options, **more)

    monkeypatch.setattr(sampling.Decoder, "decode", counting)
    go(model, out)
    assert out.read_bytes() == expected.read_bytes()
    assert sorted(asked) == [number for number in range(7) if f"{number:09d}" not in kept]
    assert left(tmp_path) == [
        f"{name}.jsonl{end}" for name in ("expected", "replies") for end in ("", ".about.json")
    ]


def test_a_stop_ends_in_order_and_the_same_call_goes_on(model, tmp_path):
    out, stop = tmp_path / "replies.jsonl", StopFlag()
    stop.request("SIGINT")
    assert go(model, out, stop=stop) == []
    assert not out.exists()
    assert go(model, out) == go(model, None)


def refused(model, out, **changes):
    with pytest.raises(ConfigError) as caught:
        go(model, out, **changes)
    return str(caught.value)


def test_another_work_is_refused_by_what_differs(model, tmp_path):
    out = tmp_path / "replies.jsonl"
    go(model, out, asked=ASKED[:2])
    text = out.read_text()
    told = refused(model, out, asked=ASKED[:2], options=dataclasses.replace(OPTIONS, seed=5, top_p=0.5))
    assert "top_p is 1.0 there, 0.5 here; seed is 0 there, 5 here; give another --out" in told
    assert "number of prompts is 2 there, 7 here" in refused(model, out)
    assert "prompts is '" in refused(model, out, asked=ASKED[1:3])
    other = write_model(tmp_path / "other", student_config(320), seed=2)
    write_context(other, Context(kind="block_causal", block_size=2))
    told = refused(other, out, asked=ASKED[:2])
    assert "weights is '" in told
    assert "context.block_size is 4 there, 2 here" in told
    assert out.read_text() == text
    out.unlink()
    assert "is of another work" in refused(model, out)
    for name in left(tmp_path):
        if name.startswith("replies"):
            (tmp_path / name).unlink()
    out.write_text("my thesis\n")
    assert "no output of tide sample" in refused(model, out)
    assert out.read_text() == "my thesis\n"


def test_what_cannot_be_asked_is_refused_before_anything_is_made(model, tmp_path):
    out = tmp_path / "replies.jsonl"
    with pytest.raises(DataError, match=r"prompts, id 'long': has .* tokens, and the model .* positions"):
        go(model, out, asked=[*ASKED, Conversation(messages=conversation("x y " * 40).messages, id="long")])
    with pytest.raises(DataError, match=r"prompts, number 1: .*contains the mask token"):
        go(model, out, asked=[conversation("<|mask|>")])
    with pytest.raises(ConfigError, match="--batch: 2 under --schedule reference"):
        go(model, out, options=Decoding(schedule="reference", batch=2))
    assert left(tmp_path) == []
