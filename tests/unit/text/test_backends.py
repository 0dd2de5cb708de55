"""Tokenizers of every kind: bytes, special tokens, the added mask, folders read and written, refusals."""

import json
import logging
import shutil

import pytest

from tests.real_tokenizers import write_sentencepiece
from tide_megatron.base.errors import DataError
from tide_megatron.text.backends.tiktoken import PATTERNS
from tide_megatron.text.spelling import SpellingError
from tide_megatron.text.tokenizer import Tokenizer

KINDS = ("qwen3", "cl100k", "deepseek", "sentencepiece", "metaspace", "metaspace_legacy")
TEXTS = [
    "def add(a, b):\n\treturn a  +  b\r\n",
    "Zürich, naïve, 日本語 e\u0301\u0302 ﬁ ﷺ ก็",
    "emoji 👩‍💻🏳️‍🌈 end",
    "zero\u200bwidth\u200d\ufeff\u2060\u00ad",
    " lead",
    "   ",
    "",
    "\x00\x7f\u0085",
    "\n\n\n",
    "<0x0A> <s>",
    "1234567 I'LL",
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=("cl100k", "sentencepiece", "metaspace_legacy"))
def file_kind(request):
    """Name one tokenizer of each kind of file, quick to load."""
    return request.param


def copied(folder, to, **config):
    """Copy a tokenizer folder with changes to its configuration (None: without the key)."""
    shutil.copytree(folder, to)
    file = to / "tokenizer_config.json"
    content = json.loads(file.read_text()) | config
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return to


def spelled(tokenizer, ids):
    return b"".join(tokenizer.token_bytes(token) for token in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_ends_are_the_bytes_behind_each_token(real, kind, text):
    tokenizer = real[kind]
    ids, ends = with_ends(tokenizer, text)
    assert len(ids) == len(ends)
    assert ends == sorted(ends)
    assert (ends or [0])[-1] == len(text.encode())
    starts = [0, *ends]
    for token, start, end in zip(ids, starts, ends, strict=False):
        assert text.encode()[start:end] in (
            tokenizer.token_bytes(token),
            tokenizer.token_bytes(token).removeprefix(b" "),
        )
    assert spelled(tokenizer, ids) in (text.encode(), b" " + text.encode())
    assert spelled(tokenizer, tokenizer.encode(text, opening=False)) == text.encode()


@pytest.mark.parametrize("text", [text for text in TEXTS if text[:1] != " "])
def test_text_comes_back(real, kind, text):
    assert real[kind].decode(real[kind].encode(text), keep_special=True) == text


def test_special_spellings_are_one_token_wherever_they_stand(real, kind):
    tokenizer = real[kind]
    eos = tokenizer.special_tokens["eos_token"]
    ids, ends = with_ends(tokenizer, f"one{eos}two{eos}")
    places = [place for place, token in enumerate(ids) if token == tokenizer.eos_id]
    assert [ends[place] for place in places] == [3 + len(eos.encode()), 6 + 2 * len(eos.encode())]
    assert tokenizer.token_bytes(tokenizer.eos_id) == eos.encode()
    assert eos not in tokenizer.decode(ids)
    assert eos in tokenizer.decode(ids, keep_special=True)


def test_the_mask_is_added_behind_the_last_id_and_its_id_is_said(real_folders, file_kind, caplog):
    with caplog.at_level(logging.INFO, logger="tide_megatron"):
        tokenizer = Tokenizer.load(real_folders[file_kind], add_mask=True)
    assert tokenizer.mask_was_added
    assert tokenizer.mask_id == tokenizer.vocabulary_size - 1
    assert f"has no <|mask|>: added with id {tokenizer.mask_id}" in caplog.text
    assert tokenizer.encode("<|mask|>", opening=False) == [tokenizer.mask_id]
    assert tokenizer.token_bytes(tokenizer.mask_id) == b"<|mask|>"
    assert not tokenizer.has(tokenizer.mask_id + 1)


def test_qwen3_and_cl100k_have_their_known_ids(real):
    qwen3 = real["qwen3"]
    assert (qwen3.mask_id, qwen3.eos_id, qwen3.pad_id) == (151669, 151645, 151643)
    # Recorded from Qwen3's own tokenizer.json.
    recorded = {
        "def add(a, b):\n\treturn a + b\r\n": [750, 912, 2877, 11, 293, 982, 853, 264, 488, 293, 319],
        "Zürich 日本語 👩‍💻": [57, 5186, 713, 75402, 21894, 102819, 61804, 102, 378, 235, 145851],
        "<|im_start|>assistant\n<think>\n\n</think>\n\nok<|im_end|>\n": [
            *(151644, 77091, 198, 151667, 271, 151668, 271, 562, 151645, 198)
        ],
        "  two\u200b  1234 I'LL": [220, 1378, 15692, 220, 220, 16, 17, 18, 19, 358, 6, 4086],
    }
    for text, ids in recorded.items():
        assert qwen3.encode(text) == ids
    assert real["cl100k"].encode("hello world") == [15339, 1917]
    assert not real["cl100k"].has(100262)  # a gap
    assert real["cl100k"].mask_id == 100277


def test_a_saved_tokenizer_is_the_same_one(real, file_kind, tmp_path):
    first = real[file_kind]
    first.save(tmp_path)
    second = Tokenizer.load(tmp_path)
    assert second.digest == first.digest
    assert not second.mask_was_added
    for text in TEXTS:
        assert with_ends(second, text) == with_ends(first, text)


def test_a_file_alone_is_a_tokenizer_too(real_folders, file_kind, real):
    file = next(f for f in real_folders[file_kind].iterdir() if f.name != "tokenizer_config.json")
    assert Tokenizer.load(file, add_mask=True).digest == real[file_kind].digest


def test_a_pattern_has_a_name(real, real_folders, tmp_path):
    spelled_out = copied(real_folders["qwen3"], tmp_path / "x", pattern=PATTERNS["qwen"])
    assert Tokenizer.load(spelled_out, add_mask=True).digest == real["qwen3"].digest


def test_digests_know_what_decides_ids(real, real_folders, tmp_path):
    assert len({tokenizer.digest for tokenizer in real.values()}) == len(KINDS)
    config = json.loads((real_folders["cl100k"] / "tokenizer_config.json").read_text())
    added = {**config["added_tokens_decoder"], "100270": {"content": "<|new|>"}}
    others = [
        copied(real_folders["cl100k"], tmp_path / "pattern", pattern=PATTERNS["cl100k"] + "|x"),
        copied(real_folders["cl100k"], tmp_path / "added", added_tokens_decoder=added),
        copied(real_folders["cl100k"], tmp_path / "ranks"),
    ]
    file = others[-1] / "cl100k_base.tiktoken"
    first, second, *rest = file.read_text().splitlines()
    swapped = [f"{first.split()[0]} {second.split()[1]}", f"{second.split()[0]} {first.split()[1]}", *rest]
    file.write_text("\n".join(swapped))
    digests = {Tokenizer.load(folder, add_mask=True).vocabulary_digest for folder in others}
    assert len(digests | {real["cl100k"].vocabulary_digest}) == 4
    other = write_sentencepiece(tmp_path / "model", vocab_size=1990)
    assert Tokenizer.load(other, add_mask=True).vocabulary_digest != real["sentencepiece"].vocabulary_digest


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace", "metaspace_legacy"])
def test_the_space_in_front_is_no_byte_of_the_text(real, name):
    tokenizer = real[name]
    ids, ends = with_ends(tokenizer, "Hello")
    assert spelled(tokenizer, ids) == b" Hello"
    assert ends[-1] == 5
    goes_on = tokenizer.encode("Hello", opening=False)
    assert spelled(tokenizer, goes_on) == b"Hello"
    eos = tokenizer.special_tokens["eos_token"]
    ids, ends = with_ends(tokenizer, f"a{eos}b{eos} c{eos}")
    assert ends[-1] == len(f"a{eos}b{eos} c{eos}".encode())
    prefixes = spelled(tokenizer, ids).decode().replace(f"a{eos}b{eos} c{eos}", "")
    assert prefixes in (" ", f" a{eos} b{eos}  c{eos}")


def test_bytes_without_a_piece_fall_back(real):
    for name in ("sentencepiece", "metaspace"):
        tokenizer = real[name]
        ids, ends = with_ends(tokenizer, "x👩")
        assert [tokenizer.token_bytes(token) for token in ids[-4:]] == [b"\xf0", b"\x9f", b"\x91", b"\xa9"]
        assert ends[-4:] == [2, 3, 4, 5]


def test_a_folder_with_two_kinds_reads_the_json(real_folders, real, tmp_path):
    folder = copied(real_folders["metaspace"], tmp_path / "both")
    shutil.copy(real_folders["sentencepiece"] / "tokenizer.model", folder)
    assert Tokenizer.load(folder, add_mask=True).digest == real["metaspace"].digest


@pytest.mark.parametrize("name", ["metaspace", "sentencepiece"])
def test_a_text_that_holds_the_sign_for_a_space_is_refused(real, name):
    with pytest.raises(SpellingError, match=r"spell b.* x.* where the text has") as caught:
        with_ends(real[name], "a\u2581x")
    assert caught.value.place == 1


def test_a_model_that_normalises_says_so(tmp_path):
    folder = write_sentencepiece(
        tmp_path / "nfkc", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    )
    tokenizer = Tokenizer.load(folder, add_mask=True)
    assert with_ends(tokenizer, "plain text")[1][-1] == 10
    with pytest.raises(
        SpellingError, match=r"normalises text to NFKC: write the record in NFKC, or use a model"
    ):
        with_ends(tokenizer, "one ﬁne")
    with pytest.raises(
        SpellingError, match=r"spell b'two' where the text has b' two' \(byte 4\): it changes"
    ):
        with_ends(tokenizer, "one  two")


def test_a_model_without_byte_fallback_says_what_it_cannot_spell(tmp_path):
    folder = write_sentencepiece(tmp_path / "plain", byte_fallback=False)
    tokenizer = Tokenizer.load(folder, add_mask=True)
    with pytest.raises(SpellingError, match=r"spell b'<unk>.*byte 2\)"):
        with_ends(tokenizer, "x 日")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("qwen3", {"pattern": None}, 'cl100k, qwen, as "pattern" into tokenizer_config.json'),
        ("qwen3", {"pattern": "qwen2"}, "pattern: 'qwen2' is unknown: did you mean 'qwen'"),
        ("qwen3", {"pattern": "("}, "tiktoken refuses these ranks and this pattern"),
        (
            "qwen3",
            {"added_tokens_decoder": {"7": {"content": "<x>"}}},
            "two tokens have one id (special token '<x>'",
        ),
        ("qwen3", {"added_tokens_decoder": {"x": {"content": "<x>"}}}, "added_tokens_decoder must be"),
        ("qwen3", {"added_tokens_decoder": {"200000": "<x>"}}, "added_tokens_decoder must be"),
        ("qwen3", {"added_tokens_decoder": ["<x>"]}, "added_tokens_decoder must be"),
        (
            "qwen3",
            {"added_tokens_decoder": {"200000": {"content": "<x>"}, "200001": {"content": "<x>"}}},
            "has '<x>' twice",
        ),
        ("qwen3", {"eos_token": None}, "no end token: pass eos"),
        (
            "sentencepiece",
            {"added_tokens_decoder": {"7": {"content": "<x>"}}},
            "'<x>' has id 7, which is '<0x04>'",
        ),
        ("sentencepiece", {"eos_token": "nowhere"}, "eos token 'nowhere' is not in the vocabulary"),
    ],
)
def test_configurations_that_cannot_be_are_refused(real_folders, tmp_path, name, config, message):
    with pytest.raises(DataError) as caught:
        Tokenizer.load(copied(real_folders[name], tmp_path / "spoilt", **config), add_mask=True)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "found none"),
        ({"a.tiktoken": b"", "b.tiktoken": b""}, "found a.tiktoken, b.tiktoken: give the file instead"),
        ({"a.tiktoken": b"", "tokenizer.model": b""}, "found a.tiktoken, tokenizer.model"),
        ({"tokenizer.model": b"nonsense"}, "not a SentencePiece model"),
        (
            {"a.tiktoken": b"IQ== 0\nIQ 1\n", "tokenizer_config.json": b'{"pattern": "."}'},
            "a.tiktoken:2: not a line",
        ),
        (
            {"a.tiktoken": b"IQ== 0\n", "tokenizer_config.json": b'{"pattern": "."}'},
            "has no token for byte 0",
        ),
    ],
)
def test_folders_that_are_no_tokenizer_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("x")
    with pytest.raises(DataError, match=r"not a tokenizer by its name: give tokenizer\.json"):
        Tokenizer.load(tmp_path / "vocab.txt")


@pytest.mark.parametrize("name", ["qwen3", "sentencepiece", "metaspace"])
def test_a_mask_that_is_taken_is_refused(real_folders, real, name):
    with pytest.raises(DataError, match="also the end or padding token"):
        Tokenizer.load(real_folders[name], mask=real[name].special_tokens["eos_token"])
    with pytest.raises(DataError, match="ordinary text"):
        Tokenizer.load(real_folders[name], mask="e")


def with_ends(tokenizer, text):
    """Return the ids of a text and the byte behind each."""
    ids = tokenizer.encode(text)
    return ids, tokenizer.ends(ids, text)
