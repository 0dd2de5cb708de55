"""The recorded chats in two tokenizers: what our data engine makes of them, and what the reference does.

Ours comes from `data.sample` and `text.align`, the reference's from its search, with the faults that led it
astray. A third, sound reckoning shares no code with the engine: a difference is a named fault's only if both
sides of it are as they should be.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from goldens.chunks import Chunks, replaced, same_bytes
from goldens.search import UNEQUAL, Found, Span, Spelled
from tide_megatron.data.record import ChatRecord
from tide_megatron.data.sample import Encoder, OnLong, Sample, SideChoice, Window
from tide_megatron.text.align import align_chats
from tide_megatron.text.chat import ChatTemplate, Encoded, encode_chat
from tide_megatron.text.tokenizer import Tokenizer

SIDE = "golden"
"""What the teacher's side of our data is called here."""
MARK = "\ue0ff"
"""A text that no message holds."""


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

    @functools.cached_property
    def spelled(self) -> Spelled:
        """Its rendered text."""
        return Spelled.of(self.pieces)

    @functools.cached_property
    def _places(self) -> list[tuple[Span, int]]:
        """Place of each content in bytes, and how much of its front is not shown.

        A content is the stretch of text that changes with it: our data engine has no part in this.
        """
        assert self.tokenizer.chat is not None, "golden tokenizers have one"
        text, found = self.spelled.text, []
        for number, message in enumerate(self.messages):
            content, other = message["content"], [*self.messages]
            other[number] = {**message, "content": MARK}
            changed = self.tokenizer.chat.render(other, add_generation_prompt=False)
            start, end = _shared(text, changed), len(text) - _shared(text[::-1], changed[::-1])
            skipped = len(content[: content.index(text[start:end])].encode())
            found.append(((self.spelled.byte(start), self.spelled.byte(end)), skipped))
        return found

    def range_of(self, message: int) -> Span:
        """Return the tokens wholly inside a content, by the place that our data engine knows."""
        content = self.encoded.contents[message]
        return Spelled(self.spelled.text, self.encoded.ends).inside(content.start, content.end)

    def sound_range(self, message: int) -> Span:
        """Return the same without our data engine."""
        return self.spelled.inside(*self._places[message][0])

    def sound_pieces(self, message: int) -> list[bytes]:
        """Return the bytes of those tokens behind a first piece: what of the content stands before them."""
        ((start, _), skipped), (first, last) = self._places[message], self.sound_range(message)
        before = (self.spelled.ends[first - 1] if first else 0) - start + skipped
        return [b" " * before, *self.pieces[first:last]]

    def searched(self, message: int) -> Span | None:
        """Return where the reference sees a content."""
        return self.spelled.searched(self.messages[message]["content"])

    def fault(self, message: int, behind: int = 0) -> str:
        """Name what leads the reference's search for one message astray; empty: nothing does."""
        return self.spelled.fault(self.messages[message]["content"], self._places[message][0], behind)

    def text_of(self, span: Span) -> str:
        """Decode a range as the reference does when it compares both sides."""
        return self.tokenizer.decode(self.ids[slice(*span)], keep_special=True).strip()


def _shared(one: str, other: str) -> int:
    """Count the characters at the front that two texts share."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


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
        return encoder.encode(ChatRecord(messages=messages, file=Path("golden"), line=1, size_bytes=0))

    def cut(self) -> Encoded:
        """Return the student's tokens inside its window."""
        messages, tokenizer = self.student.messages, self.student.tokenizer
        return encode_chat(tokenizer, messages, max_tokens=self.max_length, aligned=True)

    def chunks(self, limit: int | None = None, messages: Sequence[int] | None = None) -> Chunks:
        """Return our chunks inside both windows, of all messages or some."""
        found = align_chats(self.cut(), self.teacher.encoded, messages)
        places = [[c.teacher_start, c.teacher_end, c.student_start, c.student_end] for c in found]
        return [place for place in places if limit is None or place[1] <= limit]

    def sound_chunks(self, limit: int | None = None, messages: Sequence[int] | None = None) -> Chunks:
        """Return the same without our data engine."""
        places = []
        for message in self.messages if messages is None else messages:
            # What comes before the first whole token is a token here, and its chunk is none.
            theirs, mine = self.teacher.sound_pieces(message), self.student.sound_pieces(message)
            found = [chunk for chunk in replaced(theirs, mine) if chunk[0] and chunk[2]]
            t, s = (side.sound_range(message)[0] - 1 for side in (self.teacher, self.student))
            places += [[t + a, t + b, s + c, s + d] for a, b, c, d in same_bytes(found, theirs, mine)]
        limit = len(self.teacher.ids) if limit is None else limit
        return [place for place in places if place[3] <= self.max_length and place[1] <= limit]

    def pairs(self, chunks: Chunks) -> list[list[int]]:
        """Return the pairs [t, s]: chunks of one equal token on each side."""
        theirs, mine = self.teacher.ids, self.student.ids
        return [
            [t, s] for t, after, s, behind in chunks if after - t == behind - s == 1 and theirs[t] == mine[s]
        ]

    def ranges(self) -> list[list[int]]:
        """Return the token ranges of all contents, [t0, t1, s0, s1] each."""
        return [[*self.teacher.range_of(m), *self.student.range_of(m)] for m in self.messages]

    def sound_ranges(self) -> list[list[int]]:
        """Return the same without our data engine."""
        return [[*self.teacher.sound_range(m), *self.student.sound_range(m)] for m in self.messages]

    def sound_end(self, limit: int | None = None) -> int:
        """Return where our rule ends the teacher: with its last chunk if either side is cut, else not."""
        whole = len(self.teacher.ids)
        limit = whole if limit is None else limit
        if len(self.student.ids) <= self.max_length and whole <= limit:
            return whole
        return max((place[1] for place in self.sound_chunks(limit)), default=min(whole, limit))

    def searched_ranges(self) -> Found:
        """Search every content from the front, on both sides; keep what decodes alike."""
        places, faults = [], []
        for message, sound in zip(self.messages, self.sound_ranges(), strict=True):
            theirs, mine, found = self.teacher.searched(message), self.student.searched(message), None
            if theirs and mine and self.teacher.text_of(theirs) == self.student.text_of(mine):
                found = [*theirs, *mine]
                places.append(found)
            if found != sound:
                faults += [side.fault(message) for side in (self.teacher, self.student)]
        return Found(places=places, faults=[fault for fault in faults if fault])

    def searched_pairs(self) -> Found:
        """Search every reply behind the last hit, on both sides; pair its tokens one by one."""
        sides, behind = (self.teacher, self.student), [0, 0]
        places, faults = [], []
        for message in self.replies:
            content = self.student.messages[message]["content"]
            starts = [side.spelled.text.find(content, at) for side, at in zip(sides, behind, strict=True)]
            faults += [side.fault(message, at) for side, at in zip(sides, behind, strict=True)]
            if min(starts) < 0:
                continue
            behind = [start + len(content) for start in starts]
            spans = zip(sides, starts, behind, strict=True)
            theirs, mine = (side.spelled.within(start, end) for side, start, end in spans)
            places += [[t, s] for t, s in zip(theirs, mine, strict=False) if s < self.max_length]
        faults += [UNEQUAL for t, s in places if self.teacher.ids[t] != self.student.ids[s]]
        return Found(places=places, faults=[fault for fault in faults if fault])


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
