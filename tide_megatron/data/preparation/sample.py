"""From one record to one row of every column: tokens, replies, and for each side its tokens and chunks.

`data/preparation/side.py` says what a side's columns hold.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence

import numpy
from numpy.typing import NDArray

from tide_megatron.base.errors import ConfigError, RecordError, nearest
from tide_megatron.base.files import local_path
from tide_megatron.data.columns import CUT_COLUMN, SIDE_COLUMNS
from tide_megatron.data.preparation.rejects import TooLong
from tide_megatron.data.preparation.side import side_rows
from tide_megatron.data.sources.record import ChatRecord, Reading
from tide_megatron.text.chat import Encoded, encode_chats
from tide_megatron.text.tokenizer import OPTIONS, Tokenizer
from tide_megatron.text.turns import Chat

COLUMNS = ("ids", "replies", "reply_bytes")
"""Of every data set; `data.columns` says what they hold."""
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

    row: dict[str, NDArray[numpy.int32]]
    counts: collections.Counter[str]
    """Of the student."""
    side_counts: dict[str, collections.Counter[str]]
    """Of each side."""
    longest: dict[str, int]
    """Tokens, by side; the student's under the empty name."""


Outcome = Sample | str | RecordError
"""A sample, or why the record is left out, or what is wrong with it."""


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
        [found] = self.encode_all([record])
        if isinstance(found, RecordError):
            raise found
        return found

    def encode_all(self, records: Sequence[ChatRecord]) -> list[Outcome]:
        """Encode records, each as if it were alone.

        Raises:
            DataError: no record can be encoded.
        """
        chats = [Chat(messages=one.messages, inputs=one.inputs, learnt=one.learnt) for one in records]
        students = encode_chats(
            self.tokenizer, chats, max_tokens=self.window.max_length, aligned=bool(self.sides)
        )
        found = [self._student(one) for one in students]
        for name in self.sides:
            self._add_side(name, chats, students, found)
        return found

    def _student(self, encoded: Encoded | RecordError) -> Outcome:
        """Return a sample without its sides, or why there is none."""
        if isinstance(encoded, RecordError):
            return encoded
        is_cut = encoded.uncut_tokens > self.window.max_length
        if is_cut and (reason := _reason_to_skip(encoded, self.window)):
            return reason
        row = {"ids": encoded.ids, "replies": encoded.replies, "reply_bytes": [encoded.reply_bytes]}
        if self.window.on_long is OnLong.TRUNCATE:
            row[CUT_COLUMN] = [int(is_cut)]
        return Sample(
            row={name: numpy.array(values, dtype=numpy.int32) for name, values in row.items()},
            counts=_counts(encoded, is_cut=is_cut),
            side_counts={},
            longest={"": len(encoded.ids)},
        )

    def _add_side(
        self,
        name: str,
        chats: Sequence[Chat],
        students: Sequence[Encoded | RecordError],
        found: list[Outcome],
    ) -> None:
        """Add one side's columns and counts to the samples, or put what is wrong in a sample's place."""
        places = [place for place, one in enumerate(found) if isinstance(one, Sample)]
        teachers = encode_chats(self.sides[name].tokenizer, [chats[place] for place in places], aligned=True)
        pairs = []
        for place, teacher in zip(places, teachers, strict=True):
            student, sample = students[place], found[place]
            if isinstance(teacher, RecordError):
                found[place] = teacher
                continue
            assert isinstance(student, Encoded), "what has a sample has tokens"
            assert isinstance(sample, Sample), "chosen above"
            pairs.append((sample, student, teacher))
        sides = side_rows(
            [student for _, student, _ in pairs], [teacher for *_, teacher in pairs], self.side_length(name)
        )
        for (sample, _, _), side in zip(pairs, sides, strict=True):
            sample.row.update({f"{name}.{part}": values for part, values in side.row.items()})
            sample.longest[name] = len(side.row["ids"])
            sample.side_counts[name] = side.counts


def _json_or_text(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _reason_to_skip(encoded: Encoded, window: Window) -> str | TooLong | None:
    """Say why a record that is too long is left out or refused; None: it is neither."""
    if window.on_long is OnLong.ERROR:
        return TooLong(encoded.uncut_tokens, window.max_length)
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
