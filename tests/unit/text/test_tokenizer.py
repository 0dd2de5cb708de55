"""Loading tokenizers: ids, bytes, special tokens, digests, and what is refused."""

import json
import logging

import pytest

from tests.small_tokenizer import CHATML, write_tokenizer
from tide_megatron.base.errors import DataError
from tide_megatron.text.backends.huggingface import byte_of_character
from tide_megatron.text.tokenizer import Tokenizer

TEXTS = [
    "def add(a, b):\n\treturn a+b\r\n",
    "Zürich, naïve, 日本語",
    "emoji 👩‍💻 end",
    "zero\u200bwidth",
    " lead",
    "",
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("text") / "tokenizer")


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_spell_the_text(folder, text):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_byte_alphabet_is_a_bijection_of_all_bytes():
    table = byte_of_character()
    assert sorted(table.values()) == list(range(256))
    assert (table["Ġ"], table["Ċ"], table["A"], table["ÿ"]) == (0x20, 0x0A, 0x41, 0xFF)


def test_golden_tokens_have_their_bytes(goldens):
    info = json.loads((goldens / "tokenizers/info.json").read_text())
    table = byte_of_character()
    for side in ("student", "teacher"):
        special = info[f"{side}_special"]
        tokenizer = Tokenizer.load(goldens / f"tokenizers/{side}.json", **special)
        for case in json.loads((goldens / "tokenkit_align.json").read_text())["cases"]:
            for token, spelling in zip(case[f"ids_{side}"], case[f"tokens_{side}"], strict=False):
                if all(character in table for character in spelling):
                    assert tokenizer.token_bytes(token) == bytes(table[c] for c in spelling)


def test_special_tokens_come_from_the_configuration_or_the_arguments(folder):
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 2, 3)
    assert not tokenizer.mask_was_added
    other = Tokenizer.load(folder, eos="<|pad|>", pad="<|im_start|>")
    assert (other.pad_id, other.eos_id) == (1, 0)
    assert tokenizer.token_bytes(3) == b"<|mask|>"


def test_special_tokens_may_be_objects_and_the_pad_falls_to_the_end(tmp_path):
    folder = write_tokenizer(tmp_path, eos_token={"content": "<|im_end|>", "lstrip": False}, pad_token=None)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_id == tokenizer.pad_id == 2


def test_missing_mask_is_added_on_request_behind_the_last_id_and_said(tmp_path, caplog):
    folder = write_tokenizer(tmp_path, special=("<|pad|>", "<|im_start|>", "<|im_end|>"))
    size = Tokenizer.load(folder, mask="<|im_start|>").vocabulary_size
    with pytest.raises(DataError, match=r"no file names a mask token.*tide model add-mask"):
        Tokenizer.load(folder)
    with caplog.at_level(logging.INFO, logger="tide_megatron"):
        tokenizer = Tokenizer.load(folder, add_mask=True)
    assert tokenizer.mask_was_added
    assert tokenizer.mask_id == size == tokenizer.vocabulary_size - 1
    assert f"added with id {size}" in caplog.text
    assert tokenizer.encode("a<|mask|>b")[1] == tokenizer.mask_id


def test_saved_tokenizer_is_the_same_one(tmp_path):
    folder = write_tokenizer(tmp_path / "a", special=("<|pad|>", "<|im_start|>", "<|im_end|>"))
    first = Tokenizer.load(folder, add_mask=True)
    first.save(tmp_path / "b")
    second = Tokenizer.load(tmp_path / "b")
    assert second.digest == first.digest
    assert not second.mask_was_added
    assert second.chat.source == CHATML


@pytest.mark.parametrize("part", ["merges", "vocab", "pre_tokenizer", "template", "eos"])
def test_digest_knows_every_part(tmp_path, part):
    folder = write_tokenizer(tmp_path)
    before = Tokenizer.load(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    if part == "merges":
        content["model"]["merges"][-2:] = content["model"]["merges"][:-3:-1]
    elif part == "vocab":
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    elif part == "pre_tokenizer":
        content["pre_tokenizer"]["add_prefix_space"] = True
    elif part == "template":
        write_tokenizer(tmp_path, chat_template=CHATML + " ")
    file.write_text(json.dumps(content))
    after = Tokenizer.load(folder, eos="<|pad|>" if part == "eos" else None)
    assert after.digest != before.digest
    assert (after.vocabulary_digest == before.vocabulary_digest) == (part == "template")
    assert Tokenizer.load(folder, eos="<|pad|>" if part == "eos" else None).digest == after.digest


def test_template_file_wins_over_the_configuration(tmp_path):
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("mine")
    assert Tokenizer.load(folder).chat.source == "mine"


def test_default_of_several_templates_is_taken(tmp_path):
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    assert Tokenizer.load(write_tokenizer(tmp_path, chat_template=several)).chat.source == "yes"
    assert Tokenizer.load(write_tokenizer(tmp_path, chat_template=several[:1])).chat is None


def test_settings_that_cut_or_pad_are_switched_off(tmp_path):
    folder = write_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.load(folder).encode("0123456789")) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": " "}, "a mask token is needed"),
        ({"mask": "<|im_end|>"}, "also the end or padding token"),
        ({"eos": "<|nowhere|>"}, "eos token '<|nowhere|>' is not in the vocabulary"),
        ({"pad": "<|nowhere|>"}, "pad token '<|nowhere|>' is not in the vocabulary"),
    ],
)
def test_special_tokens_that_cannot_be_had_are_refused(folder, options, message):
    with pytest.raises(DataError) as caught:
        Tokenizer.load(folder, **options)
    assert message in str(caught.value)


def test_end_token_is_required(tmp_path):
    with pytest.raises(DataError, match="no end token: pass eos"):
        Tokenizer.load(write_tokenizer(tmp_path, eos_token=None))


def test_end_token_must_stay_whole(tmp_path):
    folder = write_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["qxz"] = max(content["model"]["vocab"].values()) + 1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="not kept whole"):
        Tokenizer.load(folder, eos="qxz")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "as JSON"), ("[]", "JSON object"), ("{}", "not a tokenizer")]
)
def test_broken_files_are_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: not found"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("token", [-1, 10**6])
def test_ids_outside_the_vocabulary_have_no_bytes(folder, token):
    with pytest.raises(DataError, match=f"no token has id {token}"):
        Tokenizer.load(folder).token_bytes(token)


def test_other_alphabets_have_no_bytes(tmp_path):
    folder = write_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["▁the"] = max(content["model"]["vocab"].values()) + 1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="known for byte-level vocabularies"):
        Tokenizer.load(folder).token_bytes(10)
