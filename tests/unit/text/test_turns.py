"""Several replies of one conversation: each is what follows its own prompt, or is refused by name."""

import pytest

from tests.small_tokenizer import CHATML, write_tokenizer
from tests.unit.text.test_rendering import AGENT, CALL, CALLED, TOOLS, written
from tide_megatron.base.errors import RecordError
from tide_megatron.text.align import align_chats
from tide_megatron.text.chat import encode_chat
from tide_megatron.text.templates import Inputs
from tide_megatron.text.tokenizer import Tokenizer

TURNS = ["one", "eins zwei", "two", "drei\r\n👩‍💻", "one", "eins zwei"]
ALL = (1, 3, 5)


def chat(texts=TURNS, **keys):
    """Return alternating turns; `m3={...}` adds keys to the message of index 3."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    for name, more in keys.items():
        messages[int(name[1:])] |= more
    return messages


def load(folder, template, **options):
    return Tokenizer.load(write_tokenizer(folder, chat_template=template), **options)


def learnt(tokenizer, encoded):
    """Return the text of every range that is learnt."""
    ranges = zip(encoded.replies[::2], encoded.replies[1::2], strict=True)
    return [tokenizer.decode(encoded.ids[start:end], keep_special=True) for start, end in ranges]


def test_every_reply_is_what_follows_its_prompt(tmp_path):
    tokenizer = load(tmp_path, CHATML)
    encoded = encode_chat(tokenizer, chat(), learnt=ALL)
    assert learnt(tokenizer, encoded) == [f"{text}<|im_end|>\n" for text in TURNS[1::2]]
    assert encoded.reply_bytes == sum(len(text.encode()) for text in TURNS[1::2])
    assert encoded.unprompted == 0
    for number, start in zip(ALL, encoded.replies[::2], strict=True):
        prompt = tokenizer.chat.render(chat()[:number], add_generation_prompt=True)
        assert encoded.ids[:start] == tokenizer.encode(prompt), "what it is asked with"
    some = encode_chat(tokenizer, chat(), learnt=(3, 5))
    assert (some.ids, some.replies) == (encoded.ids, encoded.replies[2:])


def test_a_cut_leaves_the_ranges_in_front_of_it(tmp_path):
    tokenizer = load(tmp_path, CHATML)
    whole = encode_chat(tokenizer, chat(), learnt=ALL)
    starts, ends = whole.replies[::2], whole.replies[1::2]
    for limit in range(1, len(whole.ids)):
        cut = encode_chat(tokenizer, chat(), learnt=ALL, max_tokens=limit)
        begun = max(1, sum(start < limit for start in starts))
        assert cut.replies == [min(place, limit) for place in whole.replies[: 2 * begun]]
        full = sum(len(text.encode()) for text, end in zip(TURNS[1::2], ends, strict=True) if end <= limit)
        assert full <= cut.reply_bytes <= whole.reply_bytes
    assert (
        encode_chat(tokenizer, chat(), learnt=ALL, max_tokens=starts[1] + 1).reply_bytes
        == len("eins zwei") + 1
    )


def test_a_prompt_that_the_tokenizer_merges_with_is_cut_off(tmp_path):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = load(tmp_path, plain + "{% if add_generation_prompt %}assistant:{% endif %}")
    encoded = encode_chat(tokenizer, chat(), learnt=ALL, aligned=True)
    assert learnt(tokenizer, encoded) == [f" {text}\n" for text in TURNS[1::2]]
    text = tokenizer.chat.render(chat(), add_generation_prompt=False)
    assert b"".join(map(tokenizer.token_bytes, encoded.ids)).decode() == text


def test_an_earlier_turn_without_its_generation_prompt_is_learnt_from_its_content_on(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path), template="qwen3")
    encoded = encode_chat(tokenizer, chat(), learnt=ALL, aligned=True)
    assert learnt(tokenizer, encoded) == [f"{text}<|im_end|>\n" for text in TURNS[1::2]]
    assert encoded.unprompted == 2
    assert encoded.reply_bytes == sum(len(text.encode()) for text in TURNS[1::2])
    # a token that holds template text as well is not learnt
    merged = encode_chat(tokenizer, chat(["one", "\n\nfoo", "two", "bar"]), learnt=(1, 3), aligned=True)
    first = merged.replies[0]
    assert merged.ends[first - 1] >= merged.contents[1].start
    assert learnt(tokenizer, merged)[0].strip("\n") == "foo<|im_end|>"


def test_what_would_be_learnt_by_half_is_refused(tmp_path):
    tokenizer = load(tmp_path, AGENT, chat_template_kwargs={"enable_thinking": True})
    thought = chat(m1={"reasoning_content": "hm"})
    with pytest.raises(
        RecordError, match=r"message 2 \(assistant\): this earlier reply has reasoning, which"
    ):
        encode_chat(tokenizer, thought, learnt=ALL)
    assert encode_chat(tokenizer, thought, learnt=(3, 5)).unprompted == 0
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}{{ '<|im_end|>' if loop.last or m.role == 'user' }}"
    asks = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = load(tmp_path / "b", f"{{% for m in messages %}}{turn}{{% endfor %}}{asks}")
    with pytest.raises(
        RecordError, match=r"message 2 \(assistant\): this earlier reply is closed differently"
    ):
        encode_chat(tokenizer, chat(), learnt=ALL)


def test_calls_of_tools_are_replies(tmp_path):
    tokenizer = Tokenizer.load(written(tmp_path, AGENT), chat_template_kwargs={"enable_thinking": True})
    encoded = encode_chat(tokenizer, CALLED, inputs=Inputs(tools=TOOLS), learnt=(2, 4))
    call, answer = learnt(tokenizer, encoded)
    assert call.startswith('<think>\nhm\n</think>\n\n\n<tool_call>\n{"name": "add", "arguments": {')
    assert call.endswith("}\n</tool_call><|im_end|>\n")
    assert answer == "<think>\nso\n</think>\n\ntwo<|im_end|>\n"
    shown = call.removeprefix("<think>\nhm").removesuffix("<|im_end|>\n")
    assert encoded.reply_bytes == len("hm") + len(shown.encode()) + len("so") + len("two")


def test_chunks_of_all_replies_are_those_of_their_messages(tmp_path):
    student = Tokenizer.load(write_tokenizer(tmp_path), template="qwen3")
    sides = [encode_chat(student, chat(), learnt=ALL, aligned=True) for _ in range(2)]
    for number in ALL:
        for chunk in align_chats(*sides, [number]):
            ranges = zip(sides[0].replies[::2], sides[0].replies[1::2], strict=True)
            assert sum(a <= chunk.student_start and chunk.student_end <= b for a, b in ranges) == 1


def test_a_chat_without_any_text_but_calls_is_encoded(tmp_path):
    tokenizer = Tokenizer.load(written(tmp_path, AGENT), chat_template_kwargs={"enable_thinking": True})
    messages = [{"role": "tool", "content": ""}, {"role": "assistant", "tool_calls": [CALL]}]
    encoded = encode_chat(tokenizer, messages, inputs=Inputs(tools=TOOLS), aligned=True)
    assert encoded.contents == []
    assert learnt(tokenizer, encoded)[0].startswith("\n<tool_call>")
