"""Ends of tokens in bytes, and what is said when tokens do not spell their text."""

import json

import pytest

from tests.small_tokenizer import CHATML, write_tokenizer
from tide_megatron.base.errors import DataError
from tide_megatron.text.chat import encode_chat
from tide_megatron.text.spelling import SpellingError, ends_of
from tide_megatron.text.tokenizer import Tokenizer


def ends(pieces, text, special=()):
    is_special = [place in special for place in range(len(pieces))]
    return ends_of(pieces, is_special, text, who="name", advice="advice")


@pytest.mark.parametrize(
    ("pieces", "special", "text", "found"),
    [
        ([], (), "", []),
        ([b"a", b"bc"], (), "abc", [1, 3]),
        ([b"\xc3", b"\xa9"], (), "é", [1, 2]),
        ([b" a", b"b"], (), "ab", [1, 2]),
        ([b" ", b"ab"], (), "ab", [0, 2]),
        ([b" ", b" ab"], (), " ab", [0, 3]),
        ([b" "], (), " ", [1]),
        ([b"  "], (), " ", [1]),
        ([b" ", b"<s>"], {1}, "<s>", [0, 3]),
        ([b"<s>", b" a", b"<s>", b" b"], {0, 2}, "<s>a<s> b", [3, 4, 7, 9]),
        ([b"<s>", b" a", b"<s>", b" b"], {0, 2}, "<s> a<s>b", [3, 5, 8, 9]),
        ([b"<s>", b"<s>", b"x"], {0, 1}, "<s><s>x", [3, 6, 7]),
    ],
)
def test_ends(pieces, special, text, found):
    assert ends(pieces, text, special) == found


@pytest.mark.parametrize(
    ("pieces", "special", "text", "place", "message"),
    [
        (
            [b"ab", b"x"],
            (),
            "abc",
            2,
            "name: its tokens spell b'x' where the text has b'c' (byte 2): it changes",
        ),
        ([b"ab"], (), "abc", 2, "spell b'' where the text has b'c'"),
        ([b"ab", b"c"], (), "ab", 2, "spell b'c' where the text has b''"),
        ([b"  ab"], (), "ab", 0, "b'  ab'"),
        ([b"<s>", b" x", b"<s>"], {0, 2}, "<s>a<s>", 3, "(byte 3)"),
        ([b"a ", b"b"], (), "ab", 1, "b' b' where the text has b'b'"),
        (
            ["é".encode()],
            (),
            "e\u0301",
            0,
            "normalises text to NFC: write the record in NFC, prepare with --n",
        ),
        ([b" fi"], (), "ﬁ", 0, "normalises text to NFKC"),
        (["e\u0301".encode()], (), "é", 0, "normalises text to NFD"),
        ([b"abc"], (), "Abc", 0, "it changes text, so nothing can be aligned: advice"),
    ],
)
def test_tokens_that_do_not_spell_their_text_are_refused(pieces, special, text, place, message):
    with pytest.raises(SpellingError) as caught:
        ends(pieces, text, special)
    assert caught.value.place == place
    assert message in str(caught.value)


def changed(folder, **parts):
    """Write the small tokenizer with other parts of its tokenizer.json."""
    write_tokenizer(folder, chat_template=parts.pop("chat_template", CHATML))
    content = json.loads((folder / "tokenizer.json").read_text()) | parts
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.load(folder)


def chat(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_message_that_normalisation_changes_is_named(tmp_path, number):
    tokenizer = changed(tmp_path, normalizer={"type": "NFC"})
    contents = ["é", "naïve", "a", "b"]
    assert encode_chat(tokenizer, chat(*contents)).reply_bytes == 1
    contents[number - 1] += " cafe\u0301"
    with pytest.raises(DataError) as caught:
        encode_chat(tokenizer, chat(*contents))
    role = ("assistant", "user")[number % 2]
    assert str(caught.value).startswith(f"message {number} ({role}): {tmp_path}: its tokens spell ")
    assert "in NFC, prepare with --normalize, or take the normalizer out" in str(caught.value)


def test_a_normaliser_that_is_no_unicode_form_is_told_too(tmp_path):
    tokenizer = changed(tmp_path, normalizer={"type": "Lowercase"})
    with pytest.raises(
        DataError, match=r"message 2 \(assistant\): .* spell b'pper.* has b'Upper|spell b'upper"
    ):
        encode_chat(tokenizer, chat("lower", "Upper"))


def test_template_text_that_is_changed_is_told_apart_from_messages(tmp_path):
    tokenizer = changed(
        tmp_path,
        normalizer={"type": "Lowercase"},
        chat_template=CHATML.replace("{{ m['content'] }}", "Said: {{ m['content'] }}"),
    )
    messages = chat("x", "y")
    with pytest.raises(DataError, match=r"^template text before message 1 \(user\): "):
        encode_chat(tokenizer, messages)


def test_a_byte_level_tokenizer_with_a_space_in_front_counts_it_as_nothing(tmp_path):
    tokenizer = changed(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    spaced = Tokenizer.load(tmp_path)
    ids = spaced.encode("left<|im_end|>right")
    assert ids != tokenizer.encode("left<|im_end|>right")
    assert spaced.ends(ids, "left<|im_end|>right")[-1] == len("left<|im_end|>right")
    assert spaced.encode("left", opening=False) == tokenizer.encode("left")


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace", "metaspace_legacy"])
def test_a_reply_that_merges_with_its_prompt_gets_no_space_in_front(real_folders, tmp_path, name):
    source = (
        "{% for m in messages %}{{ m['role'] }} d{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant d{% endif %}"
    )
    first = Tokenizer.load(real_folders[name], add_mask=True)
    first.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    tokenizer = Tokenizer.load(tmp_path)
    prompt = tokenizer.encode("user dx</s>assistant d")
    assert tokenizer.encode("user dx</s>assistant def y</s>")[: len(prompt)] != prompt, (
        "the case needs a merge"
    )
    encoded = encode_chat(tokenizer, chat("x", "ef y"), aligned=True)
    assert encoded.ids[: len(prompt)] == prompt
    reply = encoded.ids[encoded.prompt_tokens :]
    assert b"".join(map(tokenizer.token_bytes, reply)) == b"ef y</s>"
    assert encoded.reply_bytes == 4
    assert encoded.ends[encoded.prompt_tokens - 1] == encoded.contents[1].start
