"""Random chats in real tokenizers and templates: every chunk against a second account of what it must be.

The second account knows the templates as Python and the tokens as bytes, nothing else: where each content
stands, where tokens end, and so which boundaries both sides share.
"""

import dataclasses
import itertools
import json
import shutil
import unicodedata

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.real_tokenizers import write_deepseek
from tests.small_tokenizer import ROLES
from tide_megatron.base.errors import DataError
from tide_megatron.text.align import align_chats
from tide_megatron.text.chat import encode_chat
from tide_megatron.text.tokenizer import Tokenizer

SIDES = {  # tokenizer and template
    "student": ("qwen3", "qwen3"),
    "cl100k": ("cl100k", "chatml"),
    "deepseek": ("deepseek", "llada2"),
    "sentencepiece": ("sentencepiece", "llada2"),
    "llama": ("metaspace_legacy", "chatml"),
    "trimmed": ("metaspace", "trimmed"),
}
PAIRS = (
    ("student", "cl100k"),
    ("student", "deepseek"),
    ("student", "sentencepiece"),
    ("llama", "deepseek"),
    ("cl100k", "trimmed"),
)
PIECES = (
    *("a", "e", "Z", " ", "  ", "\n", "\n\n", "\t", ".", "'s", "12", "3456", "def f(x):\n  ", " the", "ing"),
    *("\r\n", "\r", "\x00", "\x07", "\x1b", "\x7f", "\x85", "\xa0", "\u2028", "\u3000", "\ufffd", "\ue000"),
    *("\u200b", "\u200d", "\u200c", "\ufeff", "\u2060", "\u00ad", "\u202e", "\ufe0f", "\U000e0001"),
    *("\u0301", "\u0302", "\u0323", "\u093f", "\u0e47", "\u20dd"),
    *("é", "e\u0301", "ß", "ﬁ", "ﷺ", "Å", "日", "本語", "한국", "\u1112\u1161\u11ab", "ก็", "नि", "שׁ", "𝕏"),
    *("👩‍💻", "🏳️‍🌈", "👨‍👩‍👧‍👦", "🇩🇪", "👍🏽", "#️⃣", "🫠", "🙂"),
    *("user", "assistant", "system", "SYSTEM", "<role>", "</role>", "<|role_end|>", "<|im_end|>", "<think>"),
    *("</s>", "<0x0A>", "<|im", "_start|>", "Ġ", "Ċ", "detailed thinking off", "<think>\n\n</think>\n\n"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherTokens:
    """A tokenizer and how its template writes a chat: parts of text, contents by their number."""

    tokenizer: Tokenizer
    template: str
    extra: str
    """Where it puts a space in front: of all stretches of ordinary tokens, of the first if it opens the text
    with another character than a space, or nowhere."""

    def parts(self, messages):
        """Return (text, number of the message whose content it is or None, bytes cut off at its front)."""
        templates = {"qwen3": qwen3, "llada2": llada2, "chatml": chatml, "trimmed": trimmed}
        return templates[self.template](messages)

    def spans(self, messages):
        """Return (start, end, skipped) of each content in the rendered text, in bytes."""
        spans, offset = {}, 0
        for text, number, skipped in self.parts(messages):
            end = offset + len(text.encode())
            if number is not None:
                spans[number] = (offset, end, skipped)
            offset = end
        return [spans[number] for number in range(len(messages))]

    def pieces(self, ids):
        """Return the bytes that each token adds to the text."""
        pieces, opening = [], self.extra != ""
        for token in ids:
            piece = self.tokenizer.token_bytes(token)
            if self.tokenizer.is_special(token):
                opening = self.extra == "all"
            elif opening:
                assert piece[:1] == b" "
                piece, opening = piece[1:], False
            pieces.append(piece)
        return pieces


def chatml(messages):
    for number, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", None, 0
        yield message["content"], number, 0
        yield "<|im_end|>\n", None, 0


def qwen3(messages):
    *earlier, reply = messages
    yield from chatml(earlier)
    shown = reply["content"].lstrip("\n")
    yield "<|im_start|>assistant\n<think>\n\n</think>\n\n", None, 0
    yield shown, len(earlier), len(reply["content"]) - len(shown)
    yield "<|im_end|>\n", None, 0


def llada2(messages):
    yield "<role>SYSTEM</role>", None, 0
    if messages[0]["role"] == "system":
        yield messages[0]["content"], 0, 0
        yield "\n", None, 0
    yield "detailed thinking off<|role_end|>", None, 0
    for number, message in enumerate(messages):
        if message["role"] != "system":
            yield f"<role>{'HUMAN' if message['role'] == 'user' else 'ASSISTANT'}</role>", None, 0
            yield message["content"], number, 0
            yield "<|role_end|>", None, 0


def trimmed(messages):
    for number, message in enumerate(messages):
        content = message["content"]
        yield f"<role>{message['role'].upper()}</role>", None, 0
        yield content.strip(), number, len(content[: -len(content.lstrip())].encode())
        yield "<|role_end|>", None, 0


@st.composite
def chats(draw):
    """One to three turns, a system prompt or none; contents are often drawn twice."""
    text = st.one_of(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=10).map("".join),
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), min_size=1, max_size=8
        ),
    ).filter(lambda content: content.strip() != "" and "<|mask|>" not in content)
    few = draw(st.lists(text, min_size=1, max_size=4))
    turns = draw(st.integers(1, 3))
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * turns
    return [{"role": role, "content": draw(st.sampled_from(few))} for role in roles]


@pytest.fixture(scope="module")
def sides(real_folders, tmp_path_factory):
    trimming = tmp_path_factory.mktemp("trimming") / "metaspace"
    shutil.copytree(real_folders["metaspace"], trimming)
    (trimming / "chat_template.jinja").write_text(ROLES)
    found = {}
    for name, (kind, template) in SIDES.items():
        folder, named = (trimming, None) if name == "trimmed" else (real_folders[kind], template)
        tokenizer = Tokenizer.load(folder, template=named, add_mask=True)
        found[name] = TeacherTokens(
            tokenizer=tokenizer,
            template=template,
            extra={"metaspace_legacy": "all", "metaspace": "first"}.get(kind, ""),
        )
    return found


def boundaries(span, ends):
    """Return where tokens start or end in a content, in offsets of the original one."""
    start, end, skipped = span
    return {place - start + skipped for place in (0, *ends) if start <= place <= end}


def check_chunks(student, teacher, messages, encoded):
    """Hold the chunks of a pair to the boundaries that both sides share."""
    pieces = [side.pieces(one.ids) for side, one in zip((student, teacher), encoded, strict=True)]
    ends = [list(itertools.accumulate(map(len, side))) for side in pieces]
    spans = [side.spans(messages) for side in (student, teacher)]
    for number, message in enumerate(messages):
        chunks = align_chats(*encoded, [number])
        mine = [b"".join(pieces[0][chunk.student_start : chunk.student_end]) for chunk in chunks]
        theirs = [b"".join(pieces[1][chunk.teacher_start : chunk.teacher_end]) for chunk in chunks]
        common = sorted(boundaries(spans[0][number], ends[0]) & boundaries(spans[1][number], ends[1]))
        raw = message["content"].encode()
        assert mine == theirs == [raw[a:b] for a, b in itertools.pairwise(common)]
        for chunk in chunks[:1]:
            for first, of, span in zip((chunk[0], chunk[2]), ends, spans, strict=True):
                assert (of[first - 1] if first else 0) - span[number][0] + span[number][2] == common[0]
        for chunk, after in itertools.pairwise(chunks):
            assert (chunk[1], chunk[3]) == (after[0], after[2])
            assert chunk[0] < chunk[1]
            assert chunk[2] < chunk[3]


@pytest.mark.parametrize("examples", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_chunks_of_random_chats(sides, examples):
    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        deadline=None,
    )
    @hypothesis.given(messages=chats(), cut=st.integers(1, 60))
    def check(messages, cut):
        encoded = {}
        for name, side in sides.items():
            one = encode_chat(side.tokenizer, messages, aligned=True)
            assert b"".join(side.pieces(one.ids)) == "".join(p[0] for p in side.parts(messages)).encode()
            spans = side.spans(messages)
            assert [(c.start, c.end, c.skipped) for c in one.contents] == spans
            assert one.reply_bytes == spans[-1][1] - spans[-1][0]
            encoded[name] = one
        for left, right in PAIRS:
            check_chunks(sides[left], sides[right], messages, (encoded[left], encoded[right]))
        left, right = PAIRS[cut % len(PAIRS)]
        short = encode_chat(sides[left].tokenizer, messages, max_tokens=cut, aligned=True)
        kept = [c for c in align_chats(encoded[left], encoded[right]) if c.student_end <= cut]
        assert align_chats(short, encoded[right]) == kept

    check()


def test_a_message_that_normalisation_changes_ends_in_an_error_and_others_do_not(tmp_path):
    folder = write_deepseek(tmp_path / "nfc")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(folder, template="chatml", add_mask=True)
    seen = set()

    @hypothesis.settings(
        max_examples=300, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck), deadline=None
    )
    @hypothesis.given(chosen=st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))
    def check(chosen):
        reply = "x" + "".join(chosen)
        messages = [{"role": "user", "content": "y"}, {"role": "assistant", "content": reply}]
        changed = unicodedata.normalize("NFC", reply) != reply
        seen.add(changed)
        if not changed:
            assert encode_chat(tokenizer, messages).reply_bytes == len(reply.encode())
            return
        with pytest.raises(DataError, match=r"message 2 \(assistant\): .*NFC: write the record in NFC"):
            encode_chat(tokenizer, messages)

    check()
    assert seen == {True, False}
