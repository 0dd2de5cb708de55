"""The tokenizer of the cross-tokenizer example's teacher, made from a few chats, beside the student's."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tokenizers

from tide_megatron.text.chat import encode_chat
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.resolve import load_recipe

EXAMPLES = Path(__file__).parents[3] / "examples"
CHAT = [
    {"role": "user", "content": "Join the words of a list, twice."},
    {"role": "assistant", "content": 'def join_words(words):\n    return ", ".join(words + words)[:1024]'},
]


def load(name):
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    (folder / "train.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    load("quickstart/tokenizer").main(folder, folder / "student")
    load("cross_tokenizer/teacher_tokenizer").main(folder, folder / "teacher")
    return Tokenizer.load(folder / "student"), Tokenizer.load(folder / "teacher")


def test_the_teachers_template_closes_every_turn_and_marks_the_reply(sides):
    teacher = sides[1]
    encoded = encode_chat(teacher, CHAT)
    text = teacher.decode(encoded.ids, keep_special=True)
    question, answer = (message["content"] for message in CHAT)
    assert text == f"<role>HUMAN</role>{question}<|role_end|><role>ASSISTANT</role>{answer}<|role_end|>"
    reply = teacher.decode(encoded.ids[encoded.prompt_tokens :], keep_special=True)
    assert reply == CHAT[1]["content"] + "<|role_end|>"
    assert encoded.reply_bytes == len(CHAT[1]["content"])


def test_special_tokens_lie_behind_the_teachers_vocabulary_and_nowhere_meet_the_students(sides):
    student, teacher = sides
    last = teacher.vocabulary_size
    assert (teacher.pad_id, teacher.eos_id, teacher.mask_id) == (last - 5, last - 4, last - 1)
    assert not {teacher.pad_id, teacher.eos_id, teacher.mask_id} & {
        student.pad_id,
        student.eos_id,
        student.mask_id,
    }


def test_the_teacher_splits_the_same_text_in_other_places(sides):
    student, teacher = sides
    text = "  return x.join(10)\n\n    y"
    assert text == student.decode(student.encode(text)) == teacher.decode(teacher.encode(text))
    pieces = [piece for piece, _ in pieces_of(teacher, text)]
    assert pieces == [" ", " return", " x", ".join", "(", "1", "0", ")", "\n\n    ", "y"]


def pieces_of(tokenizer, text):
    """Return what the splitter cuts, before any merge; the byte-level alphabet spelt out again."""
    described = json.loads((Path(tokenizer.name) / "tokenizer.json").read_text())["pre_tokenizer"]
    split = described["pretokenizers"][0]
    pattern = tokenizers.Regex(split["pattern"]["Regex"])
    return tokenizers.pre_tokenizers.Split(pattern, "isolated").pre_tokenize_str(text)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_shipped_tokenizers_are_those_their_models_were_trained_with(side):
    folder = EXAMPLES / ("quickstart" if side == "student" else "cross_tokenizer") / "models" / side
    tokenizer = Tokenizer.load(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert tokenizer.vocabulary_size == rows == {"student": 512, "teacher": 1024}[side]
    ids = tokenizer.encode(CHAT[1]["content"])
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == CHAT[1]["content"]


@pytest.mark.parametrize(
    ("example", "name"),
    [("quickstart", "student"), ("quickstart", "teacher"), ("cross_tokenizer", "teacher")],
)
def test_a_card_tells_of_the_committed_recipe_and_of_small_weights(example, name, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    models = EXAMPLES / example / "models"
    line = json.loads((models / "card.json").read_text())["models"][name]
    recipe, _ = load_recipe(Path(line["recipe"]), [])
    made = (line["steps"], line["seed"], line["samples_per_step"])
    assert made == (recipe.steps, recipe.seed, recipe.batch.samples)
    assert (models / name / "model.safetensors").stat().st_size <= 5_000_000
    config = json.loads((models / name / "config.json").read_text())
    assert config.get("num_experts", 4) % 4 == 0
