"""The recorded chats in two tokenizers: what our data engine makes of them, and what the reference does.

Ours comes from `data.sample` and `text.align`. The reference's ranges (spec section 4.1) and pairs (4.2) are
found by searching; each comes with the faults that led the search astray.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from goldens.alignment import replaced, same_bytes
from goldens.conversation import UNEQUAL, Conversation
from goldens.text import golden_tokenizer
from tide_megatron.data.record import ChatRecord
from tide_megatron.data.sample import Encoder, OnLong, Sample, SideChoice, Window
from tide_megatron.text.align import Chunk, align_chats
from tide_megatron.text.chat import Encoded, encode_chat

SIDE = "golden"
"""What the teacher's side of our data is called here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What the reference's search finds in one chat."""

    places: list[list[int]]
    """Ranges [t0, t1, s0, s1], or pairs [t, s]."""
    faults: list[str]
    """What led it astray, where it found something else than is there."""

    @property
    def bug(self) -> str:
        """Name all of that, each once."""
        return "; ".join(dict.fromkeys(self.faults))


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
        limit = len(self.teacher.encoded.ids) if limit is None else limit
        sides = {SIDE: SideChoice(tokenizer=self.teacher.tokenizer, max_length=limit)}
        window = Window(max_length=self.max_length, on_long=OnLong.TRUNCATE)
        encoder = Encoder(self.student.tokenizer, window, sides)
        messages = tuple(dict(message) for message in self.student.messages)
        return encoder.encode(ChatRecord(messages=messages, file=Path("golden"), line=1, size_bytes=0))

    def cut(self) -> Encoded:
        """Return the student's tokens inside its window."""
        messages, tokenizer = self.student.messages, self.student.tokenizer
        return encode_chat(tokenizer, messages, max_tokens=self.max_length, aligned=True)

    def chunks(self, limit: int | None = None) -> list[Chunk]:
        """Return our chunks of all messages inside both windows."""
        found = align_chats(self.cut(), self.teacher.encoded)
        return [chunk for chunk in found if limit is None or chunk.teacher_end <= limit]

    def pairs(self, limit: int | None = None) -> list[list[int]]:
        """Return our pairs [t, s] of replies: chunks of one equal token on each side, inside both windows."""
        student, teacher = self.cut(), self.teacher.encoded
        return [
            [chunk.teacher_start, chunk.student_start]
            for chunk in align_chats(student, teacher, self.replies)
            if chunk.student_end - chunk.student_start == chunk.teacher_end - chunk.teacher_start == 1
            and student.ids[chunk.student_start] == teacher.ids[chunk.teacher_start]
            and (limit is None or chunk.teacher_end <= limit)
        ]

    def ranges(self) -> list[list[int]]:
        """Return the token ranges of all contents, [t0, t1, s0, s1] each."""
        return [[*self.teacher.range_of(m), *self.student.range_of(m)] for m in self.messages]

    def sound_ranges(self) -> list[list[int]]:
        """Return the same without our data engine."""
        return [[*self.teacher.sound_range(m), *self.student.sound_range(m)] for m in self.messages]

    def sound_chunks(
        self, limit: int | None = None, messages: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Return the chunks [t0, t1, s0, s1] inside both windows without our data engine."""
        places = []
        for message in self.messages if messages is None else messages:
            sides = self.teacher.pieces(message), self.student.pieces(message)
            # What comes before the first whole token is a token here, and its chunk is none.
            theirs, mine = ([b" " * before, *pieces] for _, pieces, before in sides)
            found = [chunk for chunk in replaced(theirs, mine) if chunk[0] and chunk[2]]
            t, s = (span[0] - 1 for span, _, _ in sides)
            places += [[t + a, t + b, s + c, s + d] for a, b, c, d in same_bytes(found, theirs, mine)]
        return [
            place for place in places if place[3] <= self.max_length and (limit is None or place[1] <= limit)
        ]

    def sound_pairs(self, limit: int | None = None) -> list[list[int]]:
        """Return the pairs [t, s] inside both windows without our data engine."""
        theirs, mine = self.teacher.encoded.ids, self.student.encoded.ids
        return [
            [t, s]
            for t, after, s, behind in self.sound_chunks(limit, self.replies)
            if after - t == behind - s == 1 and theirs[t] == mine[s]
        ]

    def sound_end(self, limit: int | None = None) -> int:
        """Return where our rule ends the teacher: with its last chunk if either side is cut, else not."""
        whole = len(self.teacher.encoded.ids)
        limit = whole if limit is None else limit
        if len(self.student.encoded.ids) <= self.max_length and whole <= limit:
            return whole
        return max((place[1] for place in self.sound_chunks(limit)), default=min(whole, limit))

    def searched_ranges(self) -> Found:
        """Search every content from the front, on both sides; keep what decodes alike."""
        places, faults = [], []
        for message, sound in zip(self.messages, self.sound_ranges(), strict=True):
            theirs, mine = self.teacher.searched(message), self.student.searched(message)
            found = None
            if theirs and mine and self._alike(theirs, mine):
                found = [*theirs, *mine]
                places.append(found)
            if found != sound:
                faults += [side.fault(message) for side in (self.teacher, self.student)]
        return Found(places=places, faults=[fault for fault in faults if fault])

    def _alike(self, theirs: tuple[int, int], mine: tuple[int, int]) -> bool:
        return self.teacher.text_of(theirs).strip() == self.student.text_of(mine).strip()

    def searched_pairs(self) -> Found:
        """Search every reply behind the last hit, on both sides; pair its tokens one by one."""
        places, faults, behind = [], [], [0, 0]
        for message in self.replies:
            content, tokens = self.student.messages[message]["content"], []
            sides = (self.teacher, self.student)
            starts = [
                side.spelled.text.find(content, place) for side, place in zip(sides, behind, strict=True)
            ]
            faults += [side.fault(message, place) for side, place in zip(sides, behind, strict=True)]
            if min(starts) < 0:
                continue
            behind = [start + len(content) for start in starts]
            for side, start, end in zip(sides, starts, behind, strict=True):
                tokens.append(side.spelled.within(start, end))
            places += [[t, s] for t, s in zip(tokens[0], tokens[1], strict=False) if s < self.max_length]
        ids = self.teacher.encoded.ids, self.student.encoded.ids
        faults += [UNEQUAL for t, s in places if ids[0][t] != ids[1][s]]
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
    known = {"rows", "max_length", "mapped", *(f"{side}_template" for side in ("student", "teacher"))}
    if unknown := sorted(set(whole) - known):
        raise ValueError(f"unknown keys: {', '.join(unknown)}")
    folder = path.parent / "tokenizers"
    tokenizers = [golden_tokenizer(folder, *side) for side in (student, teacher)]
    chats: list[Chat] = []
    for row, told in zip(whole["rows"], whole["mapped"], strict=True):
        keys = {"input_ids", "labels", "teacher_input_ids", "_discard", "prompt_len", *extra}
        if set(row) != {"messages"} or (not told["_discard"] and set(told) != keys):
            raise ValueError(f"unknown or missing keys in row {len(chats)}")
        sides = [Conversation(tokenizer, row["messages"]) for tokenizer in tokenizers]
        chats.append(Chat(student=sides[0], teacher=sides[1], max_length=whole["max_length"], told=told))
    return chats
