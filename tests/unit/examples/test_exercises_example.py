"""The exercises' example: tokens, data without leaks, shipped models that answer as their card says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tide_megatron.data.dataset import PreparedData
from tide_megatron.tasks.exercises import Exercises
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.resolve import digest, load_recipe

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "exercises"
NAMES = ("student", "dense", "moe")


@pytest.fixture
def load(monkeypatch):
    """Load a script of the example as a run of it would, from the repository's root."""

    def load_script(name):
        monkeypatch.chdir(ROOT)
        monkeypatch.syspath_prepend(str(ROOT / "examples" / "quickstart"))
        monkeypatch.syspath_prepend(str(EXAMPLE))
        spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load_script


def test_the_tokenizer_is_the_shipped_one_with_a_token_a_character(load, tmp_path):
    load("exercise_tokenizer").main(tmp_path)
    for name in NAMES:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / file).read_bytes() == (EXAMPLE / "models" / name / file).read_bytes()
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.mask_was_added
    for question in Exercises(count=40).questions():
        answer = question.data["answer"]
        assert [tokenizer.decode([token]) for token in tokenizer.encode(answer)] == list(answer)
        text = tokenizer.chat.render(question.messages, add_generation_prompt=True)
        assert text == f"<|user|>{question.name}<|end|><|assistant|>"
        assert len(tokenizer.encode(text)) <= 17


def test_data_are_what_the_card_says_and_test_is_the_task_s(load, tmp_path, monkeypatch):
    data = load("exercise_data")
    card = json.loads((EXAMPLE / "models" / "card.json").read_text())
    data.write_exercises(tmp_path / "full")
    assert json.loads((tmp_path / "full" / "corpus.json").read_text()) == card["data"]["sources"]
    lines = {
        split: [json.loads(line)["messages"] for line in (tmp_path / f"full/{split}.jsonl").open()]
        for split in ("train", "noisy", "dev", "test")
    }
    asked = {split: {chat[0]["content"] for chat in chats} for split, chats in lines.items()}
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["dev"]
    assert asked["test"] == {question.name for question in Exercises().questions()}
    # The noisy chats ask the same; a third have an answer of their kind that is nearly always wrong.
    assert [chat[0] for chat in lines["noisy"]] == [chat[0] for chat in lines["train"]]
    wrong = [noisy for noisy, clean in zip(lines["noisy"], lines["train"], strict=True) if noisy != clean]
    assert 0.31 < len(wrong) / len(lines["train"]) < 0.34
    sums = [chat for chat in wrong if chat[0]["content"].startswith("What")]
    assert all(chat[1]["content"].isdigit() for chat in sums)
    monkeypatch.setattr(data, "TRAIN_COUNT", 40)
    columns = PreparedData(data.ensure_exercises(tmp_path / "small") / "test")
    assert len(columns) == 1000


def test_shipped_models_are_small_and_made_by_the_recipes_as_they_stand():
    sizes = [file.stat().st_size for file in (EXAMPLE / "models").rglob("*") if file.is_file()]
    assert sum(sizes) < 3e6
    card = json.loads((EXAMPLE / "models" / "card.json").read_text())
    assert set(card["models"]) == set(NAMES)
    for entry in card["models"].values():
        assert entry["digest"] == digest(load_recipe(ROOT / entry["recipe"], [])[1])


def test_shipped_models_answer_as_their_card_says(load, capsys):
    """Every 25th question of each model; `make_models.py --check` asks all."""
    scoring, makers = load("scoring"), load("make_models")
    card = json.loads(makers.CARD.read_text())["models"]
    assert 0.10 <= card["student"]["exact_match"] <= 0.60
    assert min(card["dense"]["exact_match"], card["moe"]["exact_match"]) > 0.85
    for name in ("student", "dense"):
        few = scoring.Answers.of(makers.FOLDER / name, every=25)
        assert len(few.scores) == 40
        share = sum(few.scores.values()) / 40
        assert abs(share - card[name]["exact_match"]) < 0.2


def test_tables_mark_replies_and_compare_question_by_question(load, tmp_path):
    scoring = load("scoring")
    questions = Exercises().questions()
    right = {question.name: question.data["answer"] for question in questions}
    wrong = right | {question.name: "?" for question in questions if question.data["kind"] == "add"}
    answered = {name: scoring.marked(replies) for name, replies in (("one", right), ("two", wrong))}
    assert answered["two"].summary()["exact_match_by_kind"] == {
        "add": 0.0,
        "sort": 1.0,
        "reverse": 1.0,
        "replace": 1.0,
    }
    replies = scoring.reply_table("t", scoring.first_of_each_kind(), answered).rows
    assert replies[0] == ("What is 48 + 30?", "78", "✓ 78", "✗ ?")
    assert [row[2:] for row in replies[1:]] == [(f"✓ {row[1]}",) * 2 for row in replies[1:]]
    differing = scoring.where_they_differ(answered["one"], answered["two"], 3)
    assert differing == [question.name for question in questions[:12:4]]
    scoring.write_answers(answered, tmp_path / "answers.jsonl")
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 1000
    assert json.loads(lines[0]) == {
        "question": "What is 48 + 30?",
        "answer": "78",
        "replies": {"one": "78", "two": "?"},
    }
    table = scoring.score_table(answered, "one", {"two": 12.3})
    assert table.rows[0][1:3] == ("100.0 [99.6, 100.0]", "reference")
    assert table.rows[1][1:3] == ("75.0 [72.2, 77.6]", "-25.0 [-27.7, -22.3]")
    assert table.rows[1][3] == "12"
    assert scoring.kind_table(answered).rows[1] == ("two", "0.0", "100.0", "100.0", "100.0")


def test_findings_say_better_worse_and_neither(load):
    run = load("run")
    words = [
        run.in_words(run.PairedDifference(mean=mean, ci95=(mean - 0.02, mean + 0.02), pairs=9))
        for mean in (0.05, -0.05, 0.01)
    ]
    assert words == [
        "5.0 points better (95 % interval +3.0 to +7.0)",
        "5.0 points worse (95 % interval -7.0 to -3.0)",
        "no clearly better or worse (+1.0 points, 95 % interval -1.0 to +3.0)",
    ]
