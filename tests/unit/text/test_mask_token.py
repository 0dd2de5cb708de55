"""The mask token is the one that a folder's files name, as transformers reads them."""

import json
import logging

import pytest
import transformers

from tests.small_tokenizer import write_tokenizer
from tide_megatron.base.errors import DataError
from tide_megatron.text.tokenizer import Tokenizer

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<m>", "<|mdm_mask|>")
SIZE = 314
"""Ids of the small tokenizer with these special tokens, as transformers counts them."""


def write_folder(folder, files=None, special=SPECIAL):
    """Write the small tokenizer with further JSON files; those that are there get further keys."""
    write_tokenizer(folder, special=special)
    for name, content in (files or {}).items():
        file = folder / name
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(content if isinstance(content, str) else json.dumps(old | content))
    return folder


def as_token(spelling):
    """Return a token as transformers writes it."""
    return {"content": spelling, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


NAMED = {
    "a word": ({"tokenizer_config.json": {"mask_token": "<m>"}}, "<m>"),
    "an object": (
        {"tokenizer_config.json": {"mask_token": as_token("<m>") | {"__type": "AddedToken"}}},
        "<m>",
    ),
    "the map": ({"special_tokens_map.json": {"mask_token": "<m>"}}, "<m>"),
    "an object in the map": (
        {"special_tokens_map.json": {"mask_token": as_token("<|mdm_mask|>")}},
        "<|mdm_mask|>",
    ),
    "extra tokens": ({"tokenizer_config.json": {"extra_special_tokens": {"mask_token": "<m>"}}}, "<m>"),
    "all places agree": (
        {
            "tokenizer_config.json": {"mask_token": "<m>"},
            "special_tokens_map.json": {"mask_token": as_token("<m>")},
            "config.json": {"mask_token_id": 4},
            "generation_config.json": {"mask_token_id": 4},
        },
        "<m>",
    ),
    "nulls say nothing": (
        {
            "tokenizer_config.json": {"mask_token": "<m>"},
            "config.json": {"mask_token_id": None},
        },
        "<m>",
    ),
    "one behind the vocabulary, with its id": (
        {"tokenizer_config.json": {"mask_token": "[NEW]"}, "config.json": {"mask_token_id": SIZE}},
        "[NEW]",
    ),
}
"""What a folder says in files that transformers reads its tokenizer from, and the mask token."""


@pytest.mark.parametrize("case", NAMED)
def test_the_mask_is_what_the_folder_names_and_transformers_reads(case, tmp_path):
    files, spelling = NAMED[case]
    folder = write_folder(tmp_path, files)
    ours, theirs = Tokenizer.load(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert (ours.special_tokens["mask_token"], ours.mask_id) == (theirs.mask_token, theirs.mask_token_id)
    assert ours.special_tokens["mask_token"] == spelling
    assert not ours.mask_was_added
    assert Tokenizer.load(folder, mask=spelling).digest == ours.digest


@pytest.mark.parametrize(
    ("files", "token"),
    [
        ({"config.json": {"mask_token_id": 5}}, 5),
        ({"generation_config.json": {"mask_token_id": 4}}, 4),
        ({"config.json": {"mask_token_id": 3, "model_type": "llada"}}, 3),
        ({"config.json": {"model_type": "qwen3"}}, 3),
        ({"special_tokens_map.json": {"mask_token": None}, "config.json": {"mask_token_id": 4}}, 4),
        ({}, 3),
    ],
)
def test_the_mask_is_what_the_models_config_names_else_the_usual_one(files, token, tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path, files))
    assert (tokenizer.mask_id, tokenizer.encode(SPECIAL[token], opening=False)) == (token, [token])
    assert tokenizer.special_tokens["mask_token"] == SPECIAL[token]


def test_a_mask_that_is_named_here_and_asked_for_there_has_one_digest(tmp_path):
    plain = Tokenizer.load(write_folder(tmp_path / "a"), mask="<m>")
    named = Tokenizer.load(write_folder(tmp_path / "b", {"config.json": {"mask_token_id": 4}}))
    assert plain.digest == named.digest != Tokenizer.load(tmp_path / "a").digest


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (
            {"tokenizer_config.json": {"mask_token": "<m>"}},
            {"mask": "<|mask|>"},
            "'<|mask|>' (id 3) was asked for, but",
        ),
        (
            {"special_tokens_map.json": {"mask_token": "<m>"}},
            {"mask": "<|mask|>"},
            "says '<m>' (id 4): leave mask out",
        ),
        (
            {"config.json": {"mask_token_id": 4}},
            {"mask": "<|mask|>"},
            "config.json: mask_token_id says '<m>' (id 4)",
        ),
        (
            {"config.json": {"mask_token_id": 4}},
            {"mask": "[NEW]", "add_mask": True},
            "'[NEW]' (not in the vocabulary)",
        ),
        (
            {"tokenizer_config.json": {"mask_token": "<m>"}, "config.json": {"mask_token_id": 3}},
            {},
            "correct the one",
        ),
        (
            {
                "tokenizer_config.json": {"mask_token": "<m>"},
                "special_tokens_map.json": {"mask_token": "<|mask|>"},
            },
            {},
            "special_tokens_map.json: mask_token says '<|mask|>' (id 3)",
        ),
        (
            {"config.json": {"mask_token_id": 4}, "generation_config.json": {"mask_token_id": 5}},
            {},
            "'<|mdm_mask|>' (id 5)",
        ),
        ({"config.json": {"mask_token_id": 60}}, {}, "60 is no special token of the tokenizer"),
        (
            {"config.json": {"mask_token_id": SIZE}},
            {},
            f"{SIZE} is no special token of the tokenizer beside it, whose ids end at",
        ),
        ({"config.json": {"mask_token_id": -1}}, {}, "-1 is no special token"),
        ({"config.json": {"mask_token_id": "4"}}, {}, "config.json: mask_token_id: '4' is no token id"),
        ({"config.json": {"mask_token_id": True}}, {}, "True is no token id"),
        ({"config.json": {"mask_token_id": [4]}}, {}, "[4] is no token id"),
        ({"config.json": "{"}, {}, "config.json: cannot be read as JSON"),
        (
            {"tokenizer_config.json": {"mask_token": 4}},
            {},
            "tokenizer_config.json: mask_token: 4 is no token",
        ),
        ({"tokenizer_config.json": {"mask_token": " "}}, {}, "mask_token: ' ' is no token"),
        (
            {"special_tokens_map.json": {"mask_token": {"id": 4}}},
            {},
            "special_tokens_map.json: mask_token: {'id': 4}",
        ),
        (
            {"tokenizer_config.json": {"mask_token": "[NEW]"}},
            {},
            "'[NEW]' is not in the vocabulary: name the one",
        ),
        ({}, {"mask": "<|maks|>"}, "perhaps '<|mask|>'"),
    ],
)
def test_contradictions_and_tokens_that_are_not_there_are_refused(files, options, message, tmp_path):
    with pytest.raises(DataError) as caught:
        Tokenizer.load(write_folder(tmp_path, files), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"mask": "[MASK]"}, {"mask": "<|mask|>"}])
def test_nothing_is_added_unasked(options, tmp_path, caplog):
    folder = write_folder(tmp_path, special=SPECIAL[:3])
    with pytest.raises(DataError, match="not in the vocabulary"):
        Tokenizer.load(folder, **options)
    with caplog.at_level(logging.INFO, logger="tide_megatron"):
        tokenizer = Tokenizer.load(folder, **options, add_mask=True)
    assert tokenizer.mask_was_added
    assert f"added with id {tokenizer.mask_id}" in caplog.text
