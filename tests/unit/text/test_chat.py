"""Chats in tokens: what is prompt, what is reply, how many bytes; templates that are refused."""

import json

import pytest

from tests.small_tokenizer import CHATML, write_tokenizer
from tide_megatron.base.errors import DataError
from tide_megatron.text.chat import encode_chat, labels_of
from tide_megatron.text.templates import ChatTemplate
from tide_megatron.text.tokenizer import Tokenizer


def chat(*contents, system=None):
    """Return alternating user and assistant messages."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("chat")))


def with_template(tmp_path, source, **options):
    return Tokenizer.load(write_tokenizer(tmp_path, chat_template=source), **options)


@pytest.mark.parametrize(
    "messages",
    [
        chat("Add?", "def add(a, b):\n    return a + b"),
        chat("hi", "hi"),
        chat("one", "two", "three", "four"),
        chat("Zürich", "日本語 👩‍💻", system="Be brief."),
        chat("assistant\n", "<think>x</think>"),
    ],
)
def test_reply_is_what_follows_the_generation_prompt(tokenizer, messages):
    encoded = encode_chat(tokenizer, messages)
    start, end = encoded.replies
    reply = messages[-1]["content"]
    assert end == len(encoded.ids)
    assert tokenizer.decode(encoded.ids[start:], keep_special=True) == f"{reply}<|im_end|>\n"
    assert tokenizer.decode(encoded.ids[:start], keep_special=True) == tokenizer.chat.render(
        messages[:-1], add_generation_prompt=True
    )
    assert encoded.reply_bytes == len(reply.encode())
    assert encoded.prompt_tokens == start


def test_labels_are_the_ids_of_the_replies():
    assert labels_of([5, 6, 7, 8, 9, 10], [1, 2, 4, 6], -100) == [-100, 6, -100, -100, 9, 10]
    assert labels_of([5, 6], [], -100) == [-100, -100]


def test_golden_chats_have_their_labels(goldens):
    info = json.loads((goldens / "tokenizers/info.json").read_text())
    golden = json.loads((goldens / "map_cross.json").read_text())
    compared = 0
    for side, column in (("student", ""), ("teacher", "teacher_")):
        loaded = Tokenizer.load(goldens / f"tokenizers/{side}.json", **info[f"{side}_special"])
        template = ChatTemplate(
            source=info[f"{side}_chat_template"], origin="info.json", variables={}, special_tokens={}
        )
        object.__setattr__(loaded, "chat", template)
        for row, mapped in zip(golden["rows"], golden["mapped"], strict=True):
            limit = golden["max_length"] if side == "student" else None
            encoded = encode_chat(loaded, row["messages"], max_tokens=limit)
            if mapped["_discard"]:
                assert side == "teacher" or encoded.prompt_tokens >= limit
                continue
            assert encoded.ids == mapped[f"{column}input_ids"]
            assert labels_of(encoded.ids, encoded.replies, -100) == mapped[f"{column}labels"]
            compared += 1
    assert compared == 2 * sum(not mapped["_discard"] for mapped in golden["mapped"]) > 0


@pytest.mark.parametrize("reply", ["ab cd ef", "日本語👩‍💻"])
def test_a_cut_reply_counts_the_bytes_that_are_left(tokenizer, reply):
    messages = chat("x", reply)
    whole = encode_chat(tokenizer, messages)
    start = whole.prompt_tokens
    for kept in range(start, len(whole.ids) + 1):
        cut = encode_chat(tokenizer, messages, max_tokens=kept)
        assert cut.ids == whole.ids[:kept]
        assert cut.replies == [start, kept]
        text = tokenizer.decode([i for i in cut.ids[start:] if i != tokenizer.eos_id]).rstrip("\n")
        complete = text.rstrip("\ufffd")
        # A character cut in the middle counts whole: offsets are in characters.
        assert len(complete.encode()) <= cut.reply_bytes <= len(complete.encode()) + 4
        assert complete != text or cut.reply_bytes == len(complete.encode())


def test_a_merge_across_the_boundary_keeps_the_prompt_as_generation_sees_it(tmp_path):
    template = (
        "{% for m in messages %}{{ m['role'] }} d{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant d{% endif %}"
    )
    tokenizer = with_template(tmp_path, template)
    whole = "user dx<|im_end|>assistant def y<|im_end|>"
    prompt = tokenizer.encode("user dx<|im_end|>assistant d")
    assert tokenizer.encode(whole)[: len(prompt)] != prompt, "the case needs a merge of 'd' and 'ef'"
    encoded = encode_chat(tokenizer, chat("x", "ef y"))
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.replies == [len(prompt), len(encoded.ids)]
    assert tokenizer.decode(encoded.ids[len(prompt) :], keep_special=True) == "ef y<|im_end|>"
    assert encoded.reply_bytes == 4


def test_thinking_is_off_unless_asked_for(tmp_path):
    source = CHATML + "{% if enable_thinking is defined and not enable_thinking %}off{% endif %}"
    off, on = (
        with_template(tmp_path, source),
        with_template(tmp_path, source, chat_template_kwargs={"enable_thinking": None}),
    )
    assert off.chat.render(chat("x"), add_generation_prompt=False).endswith("off")
    assert not on.chat.render(chat("x"), add_generation_prompt=False).endswith("off")
    assert off.digest != on.digest


def test_templates_see_special_tokens_and_plain_json(tmp_path):
    tokenizer = with_template(tmp_path, "{{ eos_token }}{{ messages[0] | tojson }}")
    text = tokenizer.chat.render([{"role": "user", "content": "<é>"}], add_generation_prompt=False)
    assert text == '<|im_end|>{"role": "user", "content": "<é>"}'


def test_a_stripping_template_is_fine(tmp_path):
    tokenizer = with_template(tmp_path, CHATML.replace("m['content']", "m['content'] | trim"))
    encoded = encode_chat(tokenizer, chat("x", "  two words \n"))
    assert encoded.reply_bytes == len("two words")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "does not parse"),
        ("{{ raise_exception('system first') }}", "refuses these messages: system first"),
        ("{{ messages[0].nothing.at_all }}", "fails on these messages"),
        ("{{ ''.__class__.__mro__ }}", "fails on these messages"),
        ("{{ messages.append(1) }}", "fails on these messages"),
        (
            "{% if add_generation_prompt %}A{% else %}B{{ messages[-1].content }}{% endif %}",
            "cannot be told apart",
        ),
        (CHATML.replace("m['content']", "m['content'] | upper"), "loses or changes message 1 (user): 'one'"),
    ],
)
def test_templates_that_cannot_work_are_refused(tmp_path, source, message):
    tokenizer = with_template(tmp_path, source)
    with pytest.raises(DataError) as caught:
        encode_chat(tokenizer, chat("one", "two"))
    assert message in str(caught.value)


@pytest.mark.parametrize(("contents", "number"), [((" ", "two"), 1), (("one", "\n"), 2), (("", "two"), 1)])
def test_a_message_that_is_empty_once_it_is_stripped_is_named(tmp_path, contents, number):
    tokenizer = with_template(tmp_path, CHATML.replace("m['content']", "m['content'] | trim"))
    with pytest.raises(DataError, match=rf"message {number} \(.*\) has nothing to show"):
        encode_chat(tokenizer, chat(*contents))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] * 2 }}"),
            "repeats or reorders message 1 (user)",
        ),
        (
            CHATML.replace("m['content']", "m['content'] if m['role'] == 'assistant'"),
            "loses message 1 (user)",
        ),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'].replace('a', 'b') }}"),
            "changes message 2 (assistant)",
        ),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | tojson }}"), "changes message 1 (user)"),
    ],
)
def test_a_template_that_loses_a_message_is_refused_by_number(tmp_path, template, message):
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(DataError) as caught:
        encode_chat(tokenizer, chat('"one"', "a two"))
    assert message in str(caught.value)


def test_a_tokenizer_without_template_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"add chat_template\.jinja"):
        encode_chat(with_template(tmp_path, None), chat("one", "two"))


def test_text_that_holds_the_mask_token_is_refused(tokenizer):
    with pytest.raises(DataError, match="contains the mask token"):
        encode_chat(tokenizer, chat("one", "two <|mask|>"))
