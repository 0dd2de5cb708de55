"""The quickstart's corpus and tokenizer scripts, on a few made-up source files."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tide_megatron.base.errors import DataError
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.diffusion.mask import Context
from tide_megatron.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[3] / "examples" / "quickstart"

MODULE = '''
def long_signature(
    first, second,
):
    """Return the sum of two numbers, slowly and with care.

    More text.
    """

    total = first + second
    # a comment stays
    return total

class Thing:
    async def method(self):
        """Say hi."""
        def inner(number):
            \'\'\'Double it twice.\'\'\'
            return number * 4
        return inner(self.value)

    def no_docstring(self):
        return 1

    def only_docstring(self):
        """Nothing else."""

    def on_one_line(self): "Doc"; return 1
'''


def load(name):
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus():
    return load("corpus")


@pytest.fixture
def root(tmp_path):
    for name in ("a.py", "package/b.py", "tests/c.py", "_vendor/d.py", "package/testing/e.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(MODULE)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    return tmp_path


def test_functions_lose_their_docstring_and_nothing_else(corpus, root):
    pairs = {pair.request: pair.reply for pair in corpus.extract("x", root, "a.py")}
    assert pairs == {
        "Return the sum of two numbers, slowly": (
            "def long_signature(\n    first, second,\n):\n    total = first + second\n    # a comment stays\n"
            "    return total"
        ),
        "Say hi.": (
            "async def method(self):\n    def inner(number):\n        '''Double it twice.'''\n"
            "        return number * 4\n    return inner(self.value)"
        ),
        "Double it twice.": "def inner(number):\n    return number * 4",
    }


def test_tests_and_vendored_code_are_skipped_and_bad_files_have_no_pairs(corpus, root):
    assert corpus.list_files(root) == ["a.py", "broken.py", "latin.py", "package/b.py"]
    assert corpus.extract("x", root, "broken.py") == corpus.extract("x", root, "latin.py") == []


def test_caps_cut_at_words_and_lines(corpus):
    assert corpus.cut_request("word " * 30) == ("word " * 8).strip()
    assert corpus.cut_request("x" * 100) == ""
    assert corpus.cut_reply("a" * 70 + "\n" + "b" * 65 + "\nc") == "a" * 70 + "\n" + "b" * 65
    assert corpus.cut_reply("a" * 70 + "\n" + "b" * 66) == "a" * 70
    assert corpus.cut_reply("a" * 137) == ""


def test_repeated_replies_are_kept_once(corpus, root):
    pairs, num_repeated = corpus.gather({"x": root})
    assert (len(pairs), num_repeated) == (3, 3)
    assert {pair.file for pair in pairs} == {"a.py"}


def test_a_file_always_lands_in_the_same_split(corpus):
    splits = [corpus.split_of("stdlib", f"m{number}.py") for number in range(2000)]
    assert splits[:4] == [corpus.split_of("stdlib", f"m{number}.py") for number in range(4)]
    assert 0.87 < splits.count("train") / 2000 < 0.93
    assert splits.count("dev") > 60
    assert splits.count("test") > 60
    assert corpus.split_of("stdlib", "argparse.py") == corpus.split_of("stdlib", "argparse.py")


def test_corpus_tokenizer_and_data_fit_together(corpus, root, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "find_sources", lambda: {"stdlib": root})
    monkeypatch.setattr(corpus, "split_of", lambda source, file: "train")
    card = corpus.write_corpus(tmp_path / "text")
    assert card["splits"]["train"]["pairs"] == 3
    assert card["sources_missing"] == ["networkx", "numpy", "sympy", "torch"]
    assert json.loads((tmp_path / "text/corpus.json").read_text()) == card
    load("tokenizer").main(tmp_path / "text", tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    assert not tokenizer.mask_was_added
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 2, 3)
    assert tokenizer.vocabulary_size <= 512
    prepare([tmp_path / "text/train.jsonl"], tokenizer, tmp_path / "data", max_length=200)
    row = PreparedData(tmp_path / "data").row(2)
    reply = tokenizer.decode(row["ids"][row["replies"][0] :].tolist(), keep_special=True)
    assert reply.endswith("return number * 4<|im_end|>")


@pytest.mark.slow
def test_the_real_corpus_is_large_and_leaks_nothing(tmp_path):
    subprocess.run([sys.executable, str(FOLDER / "corpus.py"), str(tmp_path)], check=True, timeout=240)
    replies, files = {}, {}
    for split in ("train", "dev", "test"):
        lines = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        replies[split] = {line["messages"][1]["content"] for line in lines}
        files[split] = {(line["source"], line["file"]) for line in lines}
        assert len(replies[split]) == len(lines)
    assert len(replies["train"]) > 20_000
    assert len(replies["test"]) > 800
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not replies[one] & replies[other]
        assert not files[one] & files[other]


def test_making_no_model_keeps_a_card_s_entries_if_they_are_of_the_same_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    shipping = load("shipping")
    (tmp_path / "corpus.json").write_text("{}")
    (tmp_path / "manifest.json").write_text(json.dumps({"digest": "d1"}))
    entries = {"student": {"nll_per_byte": 2.0}, "teacher": {"nll_per_byte": 1.5}}
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"data": {"test_digest": "d1"}, "models": entries}))
    models = {
        name: shipping.Shipped(
            folder=tmp_path / name,
            recipe=tmp_path / f"{name}.yaml",
            context=Context(kind="bidirectional"),
            data=tmp_path,
        )
        for name in entries
    }
    makers = shipping.Makers(only=["dense"])
    shipping.write_card(card, "toys", tmp_path, models, makers)
    assert json.loads(card.read_text())["models"] == entries
    (tmp_path / "manifest.json").write_text(json.dumps({"digest": "d2"}))
    with pytest.raises(DataError, match="other held-out data; make all its models again"):
        shipping.write_card(card, "toys", tmp_path, models, makers)
