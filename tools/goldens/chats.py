"""The recorded chats in two tokenizers: what our data engine makes of them, and the chunks of given ranges.

Ours comes from `data.preparation.sample` and `text.align`. `Chat.chunks_within` shares no code with them: it
cuts ranges by the byte rule or as tokenkit does, as the reference's collator cuts those of map_cross.json.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from goldens.chunks import Chunks, Kinds, blanked, even_spaces, replaced, same_bytes
from tide_megatron.data.preparation.sample import Encoder, OnLong, Sample, SideChoice, Window
from tide_megatron.data.sources.record import ChatRecord
from tide_megatron.text.align import align_chats
from tide_megatron.text.chat import Encoded, encode_chat
from tide_megatron.text.templates import ChatTemplate
from tide_megatron.text.tokenizer import Tokenizer

SIDE = "golden"
"""What the teacher's side of our data is called here."""

Span = tuple[int, int]


def golden_tokenizer(folder: Path, side: str, template: str | None = None) -> Tokenizer:
    """Load `student` or `teacher` from tokenizers/, with its template of info.json or another one."""
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    special = {key: info[f"{side}_special"][key] for key in ("mask", "eos", "pad")}
    if not (folder / f"{side}.json").exists():
        raise FileNotFoundError(f"tokenizers/{side}.json")
    tokenizer = Tokenizer.load(folder / f"{side}.json", **special)
    source = info[f"{side}_chat_template"] if template is None else template
    chat = ChatTemplate(source=source, origin="info.json", variables={}, special_tokens={})
    return dataclasses.replace(tokenizer, chat=chat)


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """One conversation in one tokenizer."""

    tokenizer: Tokenizer
    messages: Sequence[Mapping[str, str]]

    @functools.cached_property
    def encoded(self) -> Encoded:
        """Its tokens, uncut."""
        return encode_chat(self.tokenizer, self.messages, aligned=True)

    @property
    def ids(self) -> list[int]:
        """Its token ids, uncut."""
        return self.encoded.ids

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each of them."""
        return [self.tokenizer.token_bytes(token) for token in self.ids]

    def range_of(self, message: int) -> Span:
        """Return the tokens wholly inside a content, by the place that our data engine knows."""
        content = self.encoded.contents[message]
        return inside(self.encoded.ends, content.start, content.end)

    def text_of(self, span: Sequence[int]) -> str:
        """Decode a range as the reference does when it compares both sides."""
        return self.tokenizer.decode(self.ids[slice(*span)], keep_special=True).strip()

    def stands_earlier(self, message: int, recorded: Span | None = None) -> bool:
        """Say whether an equal text stands before a content; if a range is given, in just its tokens."""
        ours, content = self.range_of(message), self.messages[message]["content"].strip()
        first, last = recorded or (0, ours[0])
        shown = [
            content in self.text_of(span) for span in ((first, last), (first + 1, last), (first, last - 1))
        ]
        is_found = shown == [True, False, False] if recorded else shown[0]
        return is_found and first < ours[0] and self.text_of(ours) == content


def inside(ends: Sequence[int], start: int, end: int) -> Span:
    """Return the tokens wholly inside a range of bytes, (0, 0): none; `ends`: byte behind each token."""
    first, last = bisect.bisect_left([0, *ends[:-1]], start), bisect.bisect_right(ends, end)
    return (first, last) if first < last else (0, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """One recorded chat on both sides."""

    student: Conversation
    teacher: Conversation
    max_length: int
    told: Mapping[str, Any]
    """What the reference made of it."""

    @property
    def messages(self) -> range:
        """Indices of its messages."""
        return range(len(self.student.messages))

    @property
    def replies(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [m for m in self.messages if self.student.messages[m]["role"] == "assistant"]

    def sample(self, limit: int | None = None) -> Sample | str:
        """Return what our data has of it, with at most `limit` teacher tokens, or why it has nothing."""
        limit = len(self.teacher.ids) if limit is None else limit
        sides = {SIDE: SideChoice(tokenizer=self.teacher.tokenizer, max_length=limit)}
        window = Window(max_length=self.max_length, on_long=OnLong.TRUNCATE)
        encoder = Encoder(self.student.tokenizer, window, sides)
        messages = tuple(dict(message) for message in self.student.messages)
        return encoder.encode(ChatRecord(messages=messages, learnt=(len(messages) - 1,)))

    def cut(self) -> Encoded:
        """Return the student's tokens inside its window."""
        messages, tokenizer = self.student.messages, self.student.tokenizer
        return encode_chat(tokenizer, messages, max_tokens=self.max_length, aligned=True)

    def chunks(self, limit: int | None = None, messages: Sequence[int] | None = None) -> Chunks:
        """Return our chunks inside both windows, of all messages or some."""
        found = align_chats(self.cut(), self.teacher.encoded, messages)
        places = [[c.teacher_start, c.teacher_end, c.student_start, c.student_end] for c in found]
        return [place for place in places if limit is None or place[1] <= limit]

    def chunks_within(self, ranges: Sequence[Sequence[int]], kinds: Kinds | None = None) -> Chunks:
        """Cut ranges [t0, t1, s0, s1] into chunks inside the student's window; `kinds`: as tokenkit does."""
        theirs, mine, places = self.teacher.pieces, self.student.pieces[: self.max_length], []
        for t, after, s, behind in ranges:
            both = even_spaces(theirs[t:after], mine[s:behind])
            found = same_bytes(replaced(*both, kinds), *blanked(both, kinds))
            places += [[t + a, t + b, s + c, s + d] for a, b, c, d in found]
        return places

    def sound_chunks(self, limit: int | None = None, messages: Sequence[int] | None = None) -> Chunks:
        """Return our chunks by the byte rule alone."""
        ranges, limit = self.ranges(), len(self.teacher.ids) if limit is None else limit
        found = self.chunks_within([ranges[m] for m in (self.messages if messages is None else messages)])
        return [place for place in found if place[1] <= limit]

    def pairs(self, chunks: Chunks) -> list[list[int]]:
        """Return the pairs [t, s]: chunks of one equal token on each side."""
        theirs, mine = self.teacher.ids, self.student.ids
        return [
            [t, s] for t, after, s, behind in chunks if after - t == behind - s == 1 and theirs[t] == mine[s]
        ]

    def ranges(self) -> list[list[int]]:
        """Return the token ranges of all contents, [t0, t1, s0, s1] each."""
        return [[*self.teacher.range_of(m), *self.student.range_of(m)] for m in self.messages]

    def sound_end(self, limit: int | None = None) -> int:
        """Return where our rule ends the teacher: with its last chunk if either side is cut, else not."""
        whole = len(self.teacher.ids)
        limit = whole if limit is None else limit
        if len(self.student.ids) <= self.max_length and whole <= limit:
            return whole
        return max((place[1] for place in self.sound_chunks(limit)), default=min(whole, limit))


def read_cross(path: Path) -> list[Chat]:
    """Read map_cross.json: two tokenizers, each with its template."""
    return _read(path, {"ranges", "teacher_labels"}, ("student", None), ("teacher", None))


def read_shared(path: Path) -> list[Chat]:
    """Read map_shared.json: the student's tokenizer under two templates."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    sides = [("student", whole[f"{side}_template"]) for side in ("student", "teacher")]
    return _read(path, {"align_student", "align_teacher"}, *sides)


def _read(
    path: Path, extra: set[str], student: tuple[str, str | None], teacher: tuple[str, str | None]
) -> list[Chat]:
    """Read chats, refusing keys that nobody would compare."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    known = {"rows", "max_length", "mapped", "student_template", "teacher_template"}
    if unknown := sorted(set(whole) - known):
        raise ValueError(f"unknown keys: {', '.join(unknown)}")
    tokenizers = [golden_tokenizer(path.parent / "tokenizers", *side) for side in (student, teacher)]
    keys = {"input_ids", "labels", "teacher_input_ids", "_discard", "prompt_len", *extra}
    chats: list[Chat] = []
    for row, told in zip(whole["rows"], whole["mapped"], strict=True):
        if set(row) != {"messages"} or (not told["_discard"] and set(told) != keys):
            raise ValueError(f"unknown or missing keys in row {len(chats)}")
        sides = [Conversation(tokenizer, row["messages"]) for tokenizer in tokenizers]
        chats.append(Chat(student=sides[0], teacher=sides[1], max_length=whole["max_length"], told=told))
    return chats
