"""The thinking block: for whom, and what becomes of thoughts."""

import json

import pytest

from tests.small_tokenizer import write_tokenizer
from tide_megatron.base.errors import DataError
from tide_megatron.tasks.prompts import THINK_BLOCK, Prompts
from tide_megatron.text.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "why"}]
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>")


def prompts(folder, think="auto", special=SPECIAL, **config):
    write_tokenizer(folder, special=special, **config)
    return Prompts(tokenizer=Tokenizer.load(folder), window=64, think=think)


def test_only_a_model_that_knows_the_block_is_shown_it(tmp_path):
    without = prompts(tmp_path / "a")
    knows = prompts(tmp_path / "b", special=(*SPECIAL, "<think>", "</think>"))
    assert without.text(QUESTION).endswith("<|im_start|>assistant\n")
    assert knows.text(QUESTION).endswith("<|im_start|>assistant\n" + THINK_BLOCK)
    assert prompts(tmp_path / "c", "always").text(QUESTION).endswith(THINK_BLOCK)
    never = prompts(tmp_path / "d", "never", special=(*SPECIAL, "<think>", "</think>"))
    assert never.text(QUESTION) == without.text(QUESTION)


def test_a_template_that_writes_the_block_gets_no_second_one(tmp_path):
    template = "{{ messages[0]['content'] }}<think>\n\n</think>\n\n"
    found = prompts(tmp_path, "always", chat_template=template).text(QUESTION)
    assert found.count("</think>") == 1


def test_thoughts_are_cut_out_of_replies(tmp_path):
    reply = "<think>\nhm </think>\n\nyes<think>no</think>!"
    assert prompts(tmp_path / "a", "always").reply(reply) == "yes!"
    assert prompts(tmp_path / "b", "never").reply(reply) == reply


def test_a_prefix_is_cut_into_tokens_by_itself(tmp_path):
    asked = prompts(tmp_path)
    tokenizer, text = asked.tokenizer, asked.text(QUESTION)
    assert asked.ids(text, "q", "def f") == tokenizer.encode(text) + tokenizer.encode("def f", opening=False)


def test_a_question_that_holds_the_mask_token_is_named(tmp_path):
    with pytest.raises(DataError, match=r"question q7: holds the mask token <\|mask\|>"):
        prompts(tmp_path).ids("why <|mask|>", "q7")


def test_json_of_the_test_tokenizer_has_a_template(tmp_path):
    write_tokenizer(tmp_path, chat_template=None)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(DataError, match="has no chat template"):
        Prompts(tokenizer=Tokenizer.load(tmp_path), window=8)
