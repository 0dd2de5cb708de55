"""One model, one rank: results as files, resuming, other answers refused, prompts that do not fit."""

import json
import sys

import pytest

from tests.small_task import Repeat, evaluated, write_student
from tide_megatron.base.errors import ConfigError, DataError, TideError
from tide_megatron.decode.decoder import Decoder
from tide_megatron.tasks import TASKS
from tide_megatron.tasks.folder import differences, scores_of


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(autouse=True)
def repeat(monkeypatch):
    monkeypatch.setitem(TASKS, "repeat", Repeat)


def answers_of(folder):
    lines = [line for file in folder.glob("answers-*.jsonl") for line in file.read_text().splitlines()]
    return {answer.pop("name"): answer | {"seconds": 0} for answer in map(json.loads, lines)}


def test_scores_stand_in_files_with_intervals(student, tmp_path):
    found = evaluated(student, ["repeat"], out=tmp_path)
    result, answers = found["tasks"]["repeat"], answers_of(tmp_path / "repeat")
    assert (
        json.loads(json.dumps(result))
        == json.loads((tmp_path / "result.json").read_text())["tasks"]["repeat"]
    )
    assert result["questions"] == result["of_questions"] == 9
    assert result["score"] == pytest.approx(sum(answer["score"] for answer in answers.values()) / 9)
    low, high = result["interval"]
    assert 0 <= low < result["score"] < high <= 1
    assert scores_of(tmp_path)["repeat"] == {name: answer["score"] for name, answer in answers.items()}
    assert {answer["score"] for answer in answers.values()} == {0.0, 1.0}
    assert "| repeat | 9 |" in (tmp_path / "result.md").read_text()


def test_what_is_answered_is_not_asked_again(student, tmp_path, monkeypatch):
    evaluated(student, ["repeat"], out=tmp_path / "whole")
    evaluated(student, ["repeat"], out=tmp_path / "parts", limit=5)
    assert len(answers_of(tmp_path / "parts/repeat")) == 5
    decoded = []
    plain = Decoder.decode

    def decode(self, prompts, options, **more):
        decoded.extend(more["numbers"])
        return plain(self, prompts, options, **more)

    monkeypatch.setattr(Decoder, "decode", decode)
    file = tmp_path / "parts/repeat/answers-0000.jsonl"
    file.write_bytes(file.read_bytes()[:-30])  # a kill in the middle of a line
    evaluated(student, ["repeat"], out=tmp_path / "parts")
    assert len(decoded) == 9 - 4
    assert answers_of(tmp_path / "parts/repeat") == answers_of(tmp_path / "whole/repeat")
    decoded.clear()
    again = evaluated(student, ["repeat"], out=tmp_path / "parts", limit=3)
    assert decoded == []
    assert again["tasks"]["repeat"]["questions"] == 3


def test_answers_of_another_model_or_other_options_are_refused(student, tmp_path, monkeypatch):
    evaluated(student, ["repeat"], out=tmp_path / "out", limit=2)
    other = write_student(tmp_path / "other", seed=2)
    with pytest.raises(
        ConfigError, match=r"holds answers of another model: weights is .* give another --out"
    ):
        evaluated(other, ["repeat"], out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"context\.block_size is 8 there, 4 here"):
        evaluated(student, ["repeat"], out=tmp_path / "out", block_size=4)
    with pytest.raises(ConfigError, match=r"other options: decoding\.new_tokens is 4 there, 3 here"):
        evaluated(student, ["repeat"], out=tmp_path / "out", decoding=["new_tokens=3"])
    with pytest.raises(ConfigError, match="empty_think_block is False there, True here"):
        evaluated(student, ["repeat"], out=tmp_path / "out", think="always")
    monkeypatch.setitem(TASKS, "repeat", lambda: Repeat(longest=3))
    with pytest.raises(ConfigError, match="questions is '"):
        evaluated(student, ["repeat"], out=tmp_path / "out")
    monkeypatch.setitem(TASKS, "repeat", Repeat)
    evaluated(student, ["repeat"], out=tmp_path / "out", limit=2, decoding=["batch=1"])


def test_a_prompt_gets_the_room_that_the_window_leaves(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "repeat", lambda: Repeat(longest=6))
    student = write_student(tmp_path / "student", window=33)
    result = evaluated(student, ["repeat"], out=tmp_path / "out")["tasks"]["repeat"]
    answers = answers_of(tmp_path / "out/repeat").values()
    for answer in answers:
        assert answer["room"] == max(0, min(4, 33 - answer["prompt_tokens"]))
        assert answer["tokens"] <= answer["room"]
    assert result["less_room"] == sum(0 < answer["room"] < 4 for answer in answers) > 0
    assert result["no_room"] == sum(answer["room"] == 0 for answer in answers) > 0
    without = [answer for answer in answers if not answer["room"]]
    assert {answer["score"] for answer in without} == {0.0}
    assert "leaves no room in the model's window of 33" in without[0]["why"]
    assert f"{result['no_room']} left none and count as wrong" in (tmp_path / "out/result.md").read_text()


def test_two_models_are_compared_by_question(student, tmp_path):
    other = write_student(tmp_path / "other", seed=2)
    evaluated(other, ["repeat"], out=tmp_path / "other-results")
    found = evaluated(student, ["repeat"], out=tmp_path / "own", against=tmp_path / "other-results")
    one, two = (scores_of(tmp_path / name)["repeat"] for name in ("own", "other-results"))
    compared = found["compared"]["repeat"]
    assert compared["better"] == sum(one[name] > two[name] for name in one)
    assert compared["worse"] == sum(one[name] < two[name] for name in one)
    assert compared["difference"] == pytest.approx((sum(one.values()) - sum(two.values())) / 9)


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        ({"tasks": ["repeat"], "limit": 0}, ConfigError, "--limit: 0 is too few; use 1 or more"),
        ({"tasks": ["repeat", "repeat"]}, ConfigError, "'repeat' is named twice"),
        ({"tasks": ["repeat:strict"]}, ConfigError, "repeat is a task of this package and has no filters"),
        ({"tasks": ["repeat"], "decoding": ["new_token=3"]}, ConfigError, "did you mean 'new_tokens'"),
        (
            {"tasks": ["repeat"], "decoding": ["steps=many"]},
            ConfigError,
            r"decoding\.steps: 'many' is not",
        ),
        ({"tasks": ["repeat"], "decoding": ["schedule=reference"]}, ConfigError, r"use decoding\.batch=1"),
        ({"tasks": ["repeat"], "decoding": ["steps"]}, ConfigError, "--decoding: 'steps' is no KEY=VALUE"),
        ({"tasks": ["repeat"], "against": "nothing/here"}, ConfigError, "has no results of tide evaluate"),
        ({}, ConfigError, r"give held-out data .* tasks .* or both"),
    ],
)
def test_faults_of_the_caller(student, tmp_path, words, kind, said):
    with pytest.raises(kind, match=said):
        evaluated(student, words.pop("tasks", ()), out=tmp_path, **words)
    assert not list(tmp_path.glob("repeat/answers*"))


def test_a_model_without_tokenizer_or_template_is_refused_in_a_sentence(tmp_path):
    student = write_student(tmp_path / "student")
    config = student / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}))
    with pytest.raises(DataError, match="so it cannot be asked a question: add"):
        evaluated(student, ["repeat"], out=tmp_path / "out")
    (student / "tokenizer.json").unlink()
    with pytest.raises(TideError, match=r"tokenizer\.json"):
        evaluated(student, ["repeat"], out=tmp_path / "out")


def test_differences_name_every_key():
    there, here = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(there, here) == [
        "a.c is 2 there, 4 here",
        "d is 3 there, 'nothing' here",
        "e is 'nothing' there, 5 here",
    ]


def test_without_the_harness_its_tasks_are_refused_in_a_sentence(student, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "tide_megatron.tasks.harness.loading", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.group", None)
    with pytest.raises(ConfigError, match=r"is not installed: pip install 'tide-megatron\[eval\]'"):
        evaluated(student, ["gsm8k_cot"], out=tmp_path / "out")
