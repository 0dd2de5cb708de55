"""Preparation a hundred records at a time against the plain one: the same to the last span.

Random chats of every kind in every pair of real tokenizers: ids, ends, replies, chunks, counts and errors of
`encode_chats` and `side_rows` are those of `tests/plain_chat.py` and `tests/plain_sample.py`.
"""

import random
import shutil
from pathlib import Path

import pytest

from tests import plain_chat
from tests.plain_sample import plain_sample, plain_side
from tests.real_tokenizers import (
    write_cl100k,
    write_deepseek,
    write_metaspace,
    write_qwen3,
    write_sentencepiece,
)
from tests.small_tokenizer import ROLES
from tests.unit.text.test_random_chats import PIECES
from tests.unit.text.test_rendering import AGENT, CALL, TOOLS
from tide_megatron.base.errors import RecordError
from tide_megatron.data.preparation.sample import Encoder, SideChoice, Window
from tide_megatron.data.preparation.side import side_rows
from tide_megatron.data.sources.record import ChatRecord
from tide_megatron.text.chat import encode_chats
from tide_megatron.text.templates import Inputs
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.text.turns import Chat

DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content | trim }}<｜end▁of▁sentence｜>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
SPELLINGS = (
    *("<|im_end|>", "<|im_start|>assistant\n", "</think>", "<think>\n\n</think>\n\n", "<｜Assistant｜>"),
    *("<|role_end|>", "<role>ASSISTANT</role>", "</s>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<|im"),
)
BATCH = 50
EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return each real tokenizer with a template, by name."""
    root = tmp_path_factory.mktemp("tokenizers")
    written = {
        "qwen3": (write_qwen3, {}),
        "cl100k": (write_cl100k, {}),
        "deepseek": (write_deepseek, {}),
        "sentencepiece": (write_sentencepiece, {}),
        "trimmed": (write_metaspace, {"legacy": False}),
        "llama": (write_metaspace, {"legacy": True}),
    }
    for name, (write, options) in written.items():
        write(root / name, **options)
    shutil.copytree(root / "qwen3", root / "agent")
    for name, template in (("agent", AGENT), ("deepseek", DEEPSEEK), ("trimmed", ROLES)):
        (root / name / "chat_template.jinja").write_text(template)
    packaged = {"qwen3": "qwen3", "cl100k": "chatml", "sentencepiece": "llada2", "llama": "chatml"}
    found = {
        name: Tokenizer.load(
            root / name,
            template=packaged.get(name),
            add_mask=True,
            chat_template_kwargs={"enable_thinking": True} if name == "agent" else None,
        )
        for name in (*written, "agent")
    }
    models = {"quickstart": "quickstart/models/student", "cross": "cross_tokenizer/models/teacher"}
    return found | {name: Tokenizer.load(EXAMPLES / folder) for name, folder in models.items()}


def text(draw):
    """Return a text: pieces that tokenizers stumble over, or characters of any plane."""
    kind = draw.random()
    if kind < 0.15:
        planes = (0x20, 0x80, 0x800, 0x10000, 0x20000, 0xE0000, 0xF0000, 0x100000)
        points = [draw.choice(planes) + draw.randrange(0x400) for _ in range(draw.randint(1, 9))]
        return "".join(map(chr, points))
    if kind < 0.2:
        return draw.choice((" ", "\n", "\r\n", "")) + draw.choice(SPELLINGS) + draw.choice(("", " x", "\n"))
    if kind < 0.22:
        return draw.choice(("", " ", "\n", "<|mask|>", "a <|mask|>"))
    return "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 12)))


def random_chat(draw):
    """Return a chat: messages often repeat, and some have tools, reasoning, or none in its place."""
    few = [text(draw) for _ in range(draw.randint(1, 4))]
    roles = ["system"] * (draw.random() < 0.3) + ["user", "assistant"] * draw.choice((1, 1, 1, 2, 3))
    messages = [{"role": role, "content": draw.choice(few)} for role in roles]
    inputs = Inputs()
    if draw.random() < 0.15:
        for message in messages[1::2]:
            if message["role"] == "assistant" and draw.random() < 0.7:
                message["reasoning_content"] = draw.choice(("", "hm", text(draw)))
    if draw.random() < 0.08:
        call = {"role": "assistant", "tool_calls": [CALL]} | draw.choice(({}, {"content": "x"}))
        tool = {"role": "tool", "content": draw.choice(("", *few)), "tool_call_id": "c1"}
        messages[-1:-1] = [call, tool]
        inputs = Inputs(tools=TOOLS)
        if draw.random() < 0.3:
            messages[-1] = call
    replies = [number for number, one in enumerate(messages) if number and one["role"] == "assistant"]
    some = [number for number in replies[:-1] if draw.random() < 0.7] + replies[-1:]
    return Chat(messages=messages, inputs=inputs, learnt=draw.choice((None, some, replies)))


def plain(tokenizer, chat, limit):
    """Return what the oracle makes of a chat, uncut and cut, or its fault."""
    options = {"inputs": chat.inputs, "learnt": chat.learnt, "aligned": True}
    try:
        return [
            plain_chat.encode_chat(tokenizer, chat.messages, max_tokens=tokens, **options)
            for tokens in (None, limit)
        ]
    except RecordError as fault:
        return fault


def check_tokens(found, wanted, uncut):
    assert (found.ids, found.ends.tolist(), found.contents) == (wanted.ids, wanted.ends, wanted.contents)
    assert (found.replies, found.reply_bytes) == (wanted.replies, wanted.reply_bytes)
    assert (found.unprompted, found.uncut_tokens) == (wanted.unprompted, len(uncut.ids))


def check_batch(tokenizers, chats, limit, side_limit, counts):
    """Hold one batch to the oracle, in every tokenizer and every pair."""
    ours, theirs = {}, {}
    for name, tokenizer in tokenizers.items():
        theirs[name] = [plain(tokenizer, chat, limit) for chat in chats]
        ours[name] = [
            encode_chats(tokenizer, chats, max_tokens=tokens, aligned=True) for tokens in (None, limit)
        ]
        for whole, cut, wanted in zip(*ours[name], theirs[name], strict=True):
            if isinstance(wanted, RecordError):
                assert (str(whole), whole.kind) == (str(cut), cut.kind) == (str(wanted), wanted.kind)
                counts["faults"] += 1
                continue
            check_tokens(whole, wanted[0], wanted[0])
            check_tokens(cut, wanted[1], wanted[0])
            counts["cut"] += len(cut.ids) < len(whole.ids)
            counts["several"] += len(whole.replies) > 2
    for left in tokenizers:
        for right in tokenizers:
            both = [
                number
                for number in range(len(chats))
                if isinstance(theirs[left][number], list) and isinstance(theirs[right][number], list)
            ]
            students, teachers = (
                [ours[side][place][n] for n in both] for side, place in ((left, 1), (right, 0))
            )
            for number, found in zip(both, side_rows(students, teachers, side_limit), strict=True):
                uncut, student = theirs[left][number]
                row, numbers = plain_side(
                    student, theirs[right][number][0], side_limit, student_is_cut=len(uncut.ids) > limit
                )
                assert {part: values.tolist() for part, values in found.row.items()} == row
                assert found.counts == numbers
                counts["pairs"] += 1
                counts["chunks"] += numbers["chunks"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [150, pytest.param(20_000, marks=pytest.mark.slow)])
def test_random_chats_in_all_pairs_of_tokenizers(tokenizers, number):
    counts = dict.fromkeys(("faults", "cut", "several", "pairs", "chunks"), 0)
    for batch in range(number // BATCH):
        draw = random.Random(batch)
        chats = [random_chat(draw) for _ in range(BATCH)]
        check_batch(tokenizers, chats, draw.choice((8, 20, 40, 80, 400)), draw.choice((9, 30, 1000)), counts)
    assert counts["faults"] < counts["pairs"] / 4
    assert min(counts.values()) > number / 3, counts
    print(counts)


def expected(encoder, record):
    """Return the oracle's sample, or its fault."""
    try:
        return plain_sample(encoder, record)
    except RecordError as fault:
        return fault


@pytest.mark.parametrize("on_long", ["error", "skip", "truncate"])
def test_samples_with_their_sides(tokenizers, on_long):
    draw = random.Random(on_long)
    sides = {
        "own": SideChoice(tokenizer=tokenizers["quickstart"]),
        "short": SideChoice(tokenizer=tokenizers["cross"], max_length=60),
    }
    encoder = Encoder(tokenizers["deepseek"], Window.of(50, on_long), sides)
    chats = [random_chat(draw) for _ in range(100)]
    records = [
        ChatRecord(messages=one.messages, inputs=one.inputs, learnt=one.learnt or (len(one.messages) - 1,))
        for one in chats
    ]
    kinds = set()
    for record, found in zip(records, encoder.encode_all(records), strict=True):
        wanted = expected(encoder, record)
        if isinstance(wanted, RecordError):
            assert (str(found), found.kind) == (str(wanted), wanted.kind)
            kinds.add(wanted.kind)
            continue
        kinds.add(wanted if isinstance(wanted, str) else "sample")
        if isinstance(wanted, str):
            assert found == wanted
            continue
        assert {name: values.tolist() for name, values in found.row.items()} == wanted.row
        assert found.row.keys() == set(encoder.columns)
        assert (found.counts, found.side_counts) == (wanted.counts, wanted.side_counts)
        assert found.longest == wanted.longest
    assert len(kinds) > 2, kinds
