"""The reference's way to align is as described, and finds our chunks where nothing is in doubt."""

import pytest
from transformers import PreTrainedTokenizerFast

from bench.plain_prepare import IGNORED, chunks_of, find_text, map_chat, two_pointers
from tests.small_tokenizer import CHATML, ROLES, write_other, write_tokenizer
from tide_megatron.text.align import align_chats
from tide_megatron.text.chat import encode_chat
from tide_megatron.text.tokenizer import Tokenizer

CHAT = [
    {"role": "user", "content": "Add two numbers."},
    {"role": "assistant", "content": "def add(left, right):\n    return left + right"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    return write_tokenizer(folder / "student"), write_other(folder / "teacher")


def test_two_pointers_cut_where_both_have_spelt_as_much():
    assert two_pointers(["ab", "c", "d"], ["a", "bc", "d"]) == [(0, 2, 0, 2), (2, 3, 2, 3)]
    assert two_pointers(["Ġab", "c"], ["ab", "c"]) == [(0, 1, 0, 1), (1, 2, 1, 2)], "spaces are made even"
    assert two_pointers(["ab"], ["ax", "y"]) == [], "other characters are no chunk"


def test_it_finds_our_chunks_of_a_plain_chat(folders):
    plain = [
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=template)
        for folder, template in zip(folders, (CHATML, ROLES), strict=True)
    ]
    mapped = map_chat(CHAT, *plain, 128)
    ours = [encode_chat(Tokenizer.load(folder), CHAT, aligned=True) for folder in folders]
    assert (mapped.ids, mapped.teacher_ids) == (ours[0].ids, ours[1].ids)
    start = ours[0].prompt_tokens
    assert mapped.labels == [IGNORED] * start + ours[0].ids[start:]
    wanted = [(chunk[2], chunk[3], chunk[0], chunk[1]) for chunk in align_chats(*ours)]
    assert chunks_of(mapped, *plain) == wanted
    assert map_chat(CHAT, *plain, start) is None
    assert find_text(plain[0], mapped.ids, "not there") is None
