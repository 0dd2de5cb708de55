"""A small tokenizer and a prepared data set that the data tests share."""

import pytest

from tests.small_tokenizer import write_chats, write_tokenizer
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.text.tokenizer import Tokenizer

PAIRS = [
    (f"ask {'again ' * (n % 4)}{n}", f"def f{n}():\n" + "    pass\n" * (n % 7) + f"    return {n}")
    for n in range(23)
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("small") / "tokenizer"))


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", PAIRS)


@pytest.fixture
def prepared(tmp_path, chats, tokenizer):
    """Return a fresh prepared folder of 23 samples, to read or to break."""
    prepare([chats], tokenizer, tmp_path / "prepared", max_length=128)
    return tmp_path / "prepared"
