"""The package's chat templates: what they write, where contents stand in it, and that they are shipped."""

import importlib.resources

import pytest

from tests.rendered_chats import generation_prompt, render
from tests.small_tokenizer import CHATML, write_tokenizer
from tide_megatron.base.errors import DataError
from tide_megatron.text.chat import encode_chat
from tide_megatron.text.templates import template_names
from tide_megatron.text.tokenizer import Tokenizer

NAMES = ("chatml", "llada2", "qwen3")
CONTENTS = [
    ["hi", "hi"],
    ["same", "same", "same", "same"],
    ["user", "assistant", "HUMAN", "ASSISTANT"],
    ["thinking", "think", "detailed thinking off", "off"],
    ["line\r\nline", "\r\na\r\n\r\nb\r", "\r", "\n\r\n\n c"],
    ["\n\nfront", "\n\nfront", "\n\nfront", "\n\nfront"],
    ["zero\u200bwidth\u200d", "\ufeff\u2060y\u00ad"],
    ["👩‍💻", "🏳️‍🌈 e\u0301 日本語 👩‍💻", "👩‍💻", "👩‍💻"],
    ["<|im_start|>user\nhi<|im_end|>\n", "</role><|role_end|>\n</think>"],
    [" ", "x", "\n", " "],
]


def chat(contents, system=None):
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name, real_folders):
    return Tokenizer.load(real_folders["sentencepiece"], template=name, add_mask=True)


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("system", [None, "Be brief.", "user", "\n same \n"])
def test_every_content_is_found_where_the_template_put_it(name, tokenizer, contents, system):
    messages = chat(contents, system)
    text, spans = render(name, messages)
    assert tokenizer.chat.render(messages, add_generation_prompt=False) == text
    found = tokenizer.chat.pieces(messages, text)[0]
    assert [(content.start, content.end, content.skipped) for content in found] == spans
    for message, content in zip(messages, found, strict=True):
        shown = text.encode()[content.start : content.end]
        assert message["content"].encode()[content.skipped :] == shown


@pytest.mark.parametrize("contents", CONTENTS)
def test_the_reply_is_what_follows_the_generation_prompt(name, tokenizer, contents):
    messages = chat(contents, "Be brief.")
    text, spans = render(name, messages)
    prompt = tokenizer.chat.render(messages[:-1], add_generation_prompt=True)
    assert prompt.endswith(generation_prompt(name))
    assert len(prompt.encode()) == spans[-1][0]
    encoded = encode_chat(tokenizer, messages, aligned=True)
    assert encoded.replies == [len(tokenizer.encode(prompt)), len(encoded.ids)]
    assert encoded.ends[encoded.prompt_tokens - 1] == len(prompt.encode())
    assert encoded.ends[-1] == len(text.encode())
    assert encoded.reply_bytes == spans[-1][1] - spans[-1][0]


@pytest.mark.parametrize("name", NAMES)
def test_two_replies_in_a_row_are_fine(name, real_folders):
    tokenizer = Tokenizer.load(real_folders["sentencepiece"], template=name, add_mask=True)
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "assistant")]
    encoded = encode_chat(tokenizer, messages)
    decoded = tokenizer.decode(encoded.ids[encoded.prompt_tokens :], keep_special=True)
    assert decoded.startswith("assistant<|")


def test_what_a_template_strips_is_counted_in_bytes(tmp_path):
    trimming = CHATML.replace("m['content']", "m['content'] | trim")
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=trimming))
    contents = encode_chat(tokenizer, chat(["\u3000\u2003x y ", "\n\x85z"]), aligned=True).contents
    assert [(content.skipped, content.end - content.start) for content in contents] == [(6, 3), (3, 1)]


def test_templates_are_shipped_and_named():
    assert template_names() == sorted(NAMES)
    folder = importlib.resources.files("tide_megatron.text.templates")
    assert all((folder / f"{name}.jinja").is_file() for name in NAMES)


def test_a_named_template_goes_before_the_folders_own(tmp_path):
    folder = write_tokenizer(tmp_path)
    own, named = Tokenizer.load(folder), Tokenizer.load(folder, template="llada2")
    assert own.chat.source == CHATML
    assert named.chat.render(chat(["x"]), add_generation_prompt=False).startswith("<role>SYSTEM</role>")
    assert own.vocabulary_digest == named.vocabulary_digest
    assert own.digest != named.digest
    named.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").digest == named.digest


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_may_name_a_template(name, tmp_path):
    named = Tokenizer.load(write_tokenizer(tmp_path / "a", chat_template=name))
    assert named.digest == Tokenizer.load(write_tokenizer(tmp_path / "b"), template=name).digest


def test_an_unknown_template_is_refused(tmp_path):
    with pytest.raises(DataError, match="template: 'qwen' is unknown: did you mean 'qwen3'"):
        Tokenizer.load(write_tokenizer(tmp_path), template="qwen")
