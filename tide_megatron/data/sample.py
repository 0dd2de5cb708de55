"""From one record to one row of every column: tokens, replies, and for each side its tokens and chunks.

Truncation never leaves half a chunk: a chunk counts only if all of its tokens on both sides are inside their
windows, and a side that is cut ends where its last whole chunk does, so that the teacher is not shown text
that the student's window no longer has (spec section 4.1).
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.base.files import local_path
from tide_megatron.data.record import ChatRecord, Reading
from tide_megatron.data.rejects import TooLong
from tide_megatron.text.align import Chunk, align_chats
from tide_megatron.text.chat import Encoded, encode_chat
from tide_megatron.text.tokenizer import OPTIONS, Tokenizer

COLUMNS = ("ids", "replies", "reply_bytes")
"""Of every data set; `data.columns` says what they hold."""
CUT_COLUMN = "cut"
SIDE_COLUMNS = ("ids", "replies", "cut", "chunks")
_TEMPLATE_OPTION = f"{OPTIONS}."


class OnLong(str, enum.Enum):
    """What to do with a record of more than `max_length` tokens."""

    ERROR = "error"
    SKIP = "skip"
    TRUNCATE = "truncate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """How long a sample may be, and what happens to longer ones."""

    max_length: int
    on_long: OnLong = OnLong.ERROR

    @classmethod
    def of(cls, max_length: int, on_long: str) -> Window:
        """Check the two options.

        Raises:
            ConfigError: an unknown word or a length below 2.
        """
        if max_length < 2:
            raise ConfigError(
                f"max_length: {max_length} leaves no room for a prompt and a reply; use at least 2"
            )
        words = [word.value for word in OnLong]
        if on_long not in words:
            raise ConfigError(f"on_long: {on_long!r} is unknown: {nearest(on_long, words)}")
        return cls(max_length=max_length, on_long=OnLong(on_long))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideChoice:
    """A teacher's tokenizer that the data is also prepared for."""

    tokenizer: Tokenizer
    max_length: int | None = None
    """Most teacher tokens of a sample; None: twice the student's."""

    @classmethod
    def read(cls, place: str, *, add_mask: bool = False) -> SideChoice:
        """Load the tokenizer that FOLDER[,mask=TOKEN][,template=NAME][,max_length=N] names.

        `,chat_template_kwargs.KEY=VALUE` adds an option of its chat template; a value is JSON, or text.

        Args:
            place: as above; without a mask token the folder's own counts.
            add_mask: add it where the vocabulary lacks it; never for a teacher, who cannot know it.

        Raises:
            ConfigError: another key, an option that the template does not read, or a length that is no
                number.
            DataError: the folder has no usable tokenizer, or another mask token.
        """
        folder, *words = place.split(",")
        options = dict(word.partition("=")[::2] for word in words)
        template_options = {
            key.removeprefix(_TEMPLATE_OPTION): _json_or_text(options.pop(key))
            for key in list(options)
            if key.startswith(_TEMPLATE_OPTION)
        }
        known = ("mask", "template", "max_length")
        for key in options:
            if key not in known:
                raise ConfigError(
                    f"{place}: unknown option {key!r}; {nearest(key, (*known, _TEMPLATE_OPTION + 'KEY'))}"
                )
        length = options.get("max_length")
        if length is not None and not (length.isascii() and length.isdecimal()):
            raise ConfigError(
                f"{place}: max_length {length!r} is no number of tokens; write for example 1024"
            )
        tokenizer = Tokenizer.load(
            local_path(folder),
            mask=options.get("mask"),
            add_mask=add_mask,
            template=options.get("template"),
            chat_template_kwargs=template_options,
        )
        return cls(tokenizer=tokenizer, max_length=None if length is None else int(length))

    @staticmethod
    def split(word: str) -> tuple[str, str]:
        """Return name and place (`read`) of NAME=FOLDER[,OPTION=VALUE]....

        Raises:
            ConfigError: not such a word.
        """
        name, _, place = word.partition("=")
        if not name or not place:
            raise ConfigError(f"teacher {word!r}: write NAME=FOLDER, for example llada=models/llada2")
        return name, place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of every column, and what it adds to the statistics."""

    row: dict[str, list[int]]
    counts: collections.Counter[str]
    """Of the student."""
    side_counts: dict[str, collections.Counter[str]]
    """Of each side."""
    longest: dict[str, int]
    """Tokens, by side; the student's under the empty name."""


class Encoder:
    """Turns records into samples for one student and any number of sides."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        window: Window,
        sides: Mapping[str, SideChoice],
        reading: Reading | None = None,
    ) -> None:
        """Take the student's tokenizer and window, the sides by name, and how lines are read.

        Raises:
            ConfigError: a side's name that cannot be part of a file's name, or its window too small.
        """
        self.tokenizer, self.window, self.reading = tokenizer, window, reading or Reading()
        self.sides = dict(sides)
        for name, side in self.sides.items():
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ConfigError(f"teacher {name!r}: name it with letters, digits, - and _")
            if side.tokenizer.mask_was_added:
                raise ConfigError(
                    f"teacher {name}: its mask token {side.tokenizer.special_tokens['mask_token']!r} was "
                    "added to its tokenizer, so it cannot know it; name the one that it knows (mask=...)"
                )
            if self.side_length(name) < 2:
                raise ConfigError(
                    f"teacher {name}: max_length {side.max_length} is too short; use at least 2"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        own = (*COLUMNS, CUT_COLUMN) if self.window.on_long is OnLong.TRUNCATE else COLUMNS
        return (*own, *(f"{side}.{part}" for side in self.sides for part in SIDE_COLUMNS))

    def side_length(self, name: str) -> int:
        """Return the most tokens a sample may have on a side."""
        chosen = self.sides[name].max_length
        return 2 * self.window.max_length if chosen is None else chosen

    def encode(self, record: ChatRecord) -> Sample | str:
        """Encode one record, or say why it is left out.

        Raises:
            RecordError: it cannot be encoded; `TooLong`: it is longer than it may be.
            DataError: no record can be.
        """
        encoded = encode_chat(
            self.tokenizer,
            record.messages,
            inputs=record.inputs,
            learnt=record.learnt,
            aligned=bool(self.sides),
        )
        if reason := _reason_to_skip(encoded, self.window):
            return reason
        is_cut = len(encoded.ids) > self.window.max_length
        if is_cut:
            encoded = encode_chat(
                self.tokenizer,
                record.messages,
                inputs=record.inputs,
                learnt=record.learnt,
                max_tokens=self.window.max_length,
                aligned=bool(self.sides),
            )
        sample = Sample(
            row={"ids": encoded.ids, "replies": encoded.replies, "reply_bytes": [encoded.reply_bytes]},
            counts=_counts(encoded, is_cut=is_cut),
            side_counts={},
            longest={"": len(encoded.ids)},
        )
        if self.window.on_long is OnLong.TRUNCATE:
            sample.row[CUT_COLUMN] = [int(is_cut)]
        for name in self.sides:
            self._add_side(sample, name, record, encoded, student_is_cut=is_cut)
        return sample

    def _add_side(
        self, sample: Sample, name: str, record: ChatRecord, student: Encoded, *, student_is_cut: bool
    ) -> None:
        """Add one side's columns and counts to a sample."""
        teacher = encode_chat(
            self.sides[name].tokenizer,
            record.messages,
            inputs=record.inputs,
            learnt=record.learnt,
            aligned=True,
        )
        limit = self.side_length(name)
        chunks = [chunk for chunk in align_chats(student, teacher) if chunk.teacher_end <= limit]
        end = len(teacher.ids)
        if student_is_cut or end > limit:
            end = max((chunk.teacher_end for chunk in chunks), default=min(end, limit))
        learnt = [chunk for chunk in chunks if _is_within(chunk, student.replies)]
        sample.row[f"{name}.ids"] = teacher.ids[:end]
        sample.row[f"{name}.replies"] = _cut_ranges(teacher.replies, end)
        sample.row[f"{name}.{CUT_COLUMN}"] = [int(end < len(teacher.ids))]
        sample.row[f"{name}.chunks"] = [place for chunk in learnt for place in chunk]
        sample.longest[name] = end
        sample.side_counts[name] = collections.Counter(
            tokens=end,
            chunks=len(learnt),
            pairs=sum(_is_pair(chunk, student, teacher) for chunk in learnt),
            aligned_bytes=sum(
                student.ends[chunk.student_end - 1] - _start(student, chunk) for chunk in learnt
            ),
            cut=int(end < len(teacher.ids)),
            without_chunks=int(not learnt),
        )


def _json_or_text(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _is_within(chunk: Chunk, replies: Sequence[int]) -> bool:
    """Say whether a chunk's student tokens are of one reply."""
    ranges = zip(replies[::2], replies[1::2], strict=True)
    return any(start <= chunk.student_start and chunk.student_end <= end for start, end in ranges)


def _cut_ranges(ranges: Sequence[int], end: int) -> list[int]:
    """Cut flat ranges (start, end, start, ...) at `end`; what is behind it goes, but the first stays."""
    kept = max(1, sum(start < end for start in ranges[::2]))
    return [min(place, end) for place in ranges[: 2 * kept]]


def _is_pair(chunk: Chunk, student: Encoded, teacher: Encoded) -> bool:
    """Say whether a chunk is one token of the same id on both sides."""
    is_single = chunk.student_end - chunk.student_start == chunk.teacher_end - chunk.teacher_start == 1
    return is_single and student.ids[chunk.student_start] == teacher.ids[chunk.teacher_start]


def _start(encoded: Encoded, chunk: Chunk) -> int:
    """Return the byte at which a chunk's student tokens start."""
    return encoded.ends[chunk.student_start - 1] if chunk.student_start else 0


def _reason_to_skip(encoded: Encoded, window: Window) -> str | None:
    """Say why a record is left out (None: it is not), or refuse it."""
    length = len(encoded.ids)
    if length <= window.max_length:
        return None
    if window.on_long is OnLong.ERROR:
        raise TooLong(length, window.max_length)
    if window.on_long is OnLong.SKIP:
        return "longer than max_length"
    return "prompt fills max_length" if encoded.prompt_tokens >= window.max_length else None


def _counts(encoded: Encoded, *, is_cut: bool) -> collections.Counter[str]:
    """Return what one sample adds to the student's statistics."""
    reply_tokens = sum(encoded.replies[1::2]) - sum(encoded.replies[::2])
    return collections.Counter(
        tokens=len(encoded.ids),
        prompt_tokens=len(encoded.ids) - reply_tokens,
        reply_tokens=reply_tokens,
        reply_bytes=encoded.reply_bytes,
        truncated=int(is_cut),
        unprompted=encoded.unprompted,
    )
