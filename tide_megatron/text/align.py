"""Where two tokenizers agree: in chunks of tokens that spell the same bytes of a message, or id by id.

Each side knows where in its rendered text a message's content stands and where each of its tokens ends, in
bytes. Put into offsets of the ORIGINAL content, the token boundaries that both sides share cut it into
chunks that nothing could cut further (spec section 4.1, the byte rule). Nothing is ever searched for or
decoded, so repeated messages, characters split over tokens and templates that trim a message are no
special cases.

A token that reaches over the content's edge, into template text, belongs to no chunk; neither does what is
behind the last common boundary, or behind a cut.

Losses that compare distributions by id ask `require_shared` whether ids are the same bytes on both sides.

Left out: tokenkit's replacement tables, which match template words inside contents (spec section 9, bug 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from tide_megatron.base.errors import ConfigError
from tide_megatron.text.chat import Encoded
from tide_megatron.text.tokenizer import Tokenizer

Numbers = NDArray[numpy.int64]


class Chunk(NamedTuple):
    """Half-open token ranges that spell the same bytes."""

    student_start: int
    student_end: int
    teacher_start: int
    teacher_end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """The chunks of many conversations, in order."""

    spans: Numbers
    """[chunks, 4]: student start, end, teacher start, end, as in `Chunk`."""
    conversation: Numbers
    """[chunks]: whose, by index, ascending."""


def align_chats(student: Encoded, teacher: Encoded, messages: Sequence[int] | None = None) -> list[Chunk]:
    """Cut the contents of a conversation into chunks, in order.

    Args:
        student: the conversation in the student's tokens and template.
        teacher: the same conversation in the teacher's.
        messages: which texts, by index (one a message where none has reasoning); None: all.
    """
    if messages is not None:
        student, teacher = (
            dataclasses.replace(side, contents=[side.contents[message] for message in messages])
            for side in (student, teacher)
        )
    return [Chunk(*span) for span in align([student], [teacher]).spans.tolist()]


def align(students: Sequence[Encoded], teachers: Sequence[Encoded]) -> Alignment:
    """Cut the contents of conversations into chunks: at every boundary of tokens that both sides have.

    Of tokens without bytes the first counts. All conversations are one list of boundaries a side, at places
    that no two texts share, so that one intersection finds the chunks of all.

    Args:
        students: conversations in the student's tokens and template.
        teachers: the same conversations in the teacher's.
    """
    sides = [_Contents(students), _Contents(teachers)]
    assert numpy.array_equal(sides[0].conversation, sides[1].conversation), "both hold the same conversations"
    places = starts_of(numpy.maximum(sides[0].extents, sides[1].extents) + 1)
    (left, left_token), (right, right_token) = (side.boundaries(places) for side in sides)
    at = numpy.minimum(right.searchsorted(left), max(0, len(right) - 1))
    is_common = right[at] == left if len(right) else numpy.zeros(len(left), dtype=bool)
    common, tokens = left[is_common], (left_token[is_common], right_token[at[is_common]])
    content = places.searchsorted(common, "right") - 1
    is_chunk = content[1:] == content[:-1]
    spans = numpy.stack([part[is_chunk] for side in tokens for part in (side[:-1], side[1:])], axis=1)
    return Alignment(spans=spans, conversation=sides[0].conversation[content[:-1][is_chunk]])


class _Contents:
    """The contents of one side's conversations, and the boundaries of tokens in them."""

    def __init__(self, chats: Sequence[Encoded]) -> None:
        sizes = numpy.array([len(chat.ends) + 1 for chat in chats], dtype=numpy.int64)
        self._first = starts_of(sizes)  # of each conversation, its first boundary in the list of all
        lengths = numpy.fromiter(map(_length, chats), dtype=numpy.int64, count=len(chats))
        base = starts_of(lengths + 1)
        zero = numpy.zeros(1, dtype=numpy.int64)
        found = [part for chat in chats for part in (zero, chat.ends)]
        self._boundaries = numpy.concatenate(found or [zero[:0]]) + numpy.repeat(base, sizes)
        counts = [len(chat.contents) for chat in chats]
        self.conversation: Numbers = numpy.repeat(numpy.arange(len(chats)), counts)
        """[contents]: whose each is."""
        places = [(one.start, one.end, one.skipped) for chat in chats for one in chat.contents]
        start, end, self._skipped = numpy.array(places, dtype=numpy.int64).reshape(-1, 3).T
        self.extents: Numbers = self._skipped + end - start
        """[contents]: bytes of the original text, up to the end of what is shown."""
        self._start, self._end = start + base[self.conversation], end + base[self.conversation]

    def boundaries(self, places: Numbers) -> tuple[Numbers, Numbers]:
        """Return every place in a content where tokens meet, ascending, each once.

        Args:
            places: [contents] where each original text starts.

        Returns:
            ([boundaries], the same): the place, and the first token that starts there.
        """
        low = self._boundaries.searchsorted(self._start)
        counts = numpy.maximum(self._boundaries.searchsorted(self._end, "right") - low, 0)
        own = numpy.repeat(numpy.arange(len(counts)), counts)
        index = numpy.arange(len(own)) + (low - starts_of(counts))[own]
        found = self._boundaries[index] + (places + self._skipped - self._start)[own]
        token = index - self._first[self.conversation][own]
        is_first = numpy.ones(len(found), dtype=bool)
        is_first[1:] = found[1:] != found[:-1]
        return found[is_first], token[is_first]


def _length(chat: Encoded) -> int:
    """Return the bytes of a conversation, of a cut one with the texts behind its last token."""
    last = int(chat.ends[-1]) if len(chat.ends) else 0
    return max(last, chat.contents[-1].end) if chat.contents else last


def starts_of(sizes: Numbers) -> Numbers:
    """Return where each of several runs starts that stand one behind the other, from their sizes."""
    return numpy.cumsum(sizes) - sizes


def differing_ids(left: Tokenizer, right: Tokenizer, limit: int) -> list[int]:
    """List the ids below `limit` that are not the same bytes in both vocabularies; mask tokens are exempt.

    An id that one side does not have differs. Each model is shown its own mask token, and neither is ever a
    target, so their spelling does not matter.
    """
    exempt = {left.mask_id, right.mask_id}
    return [
        token for token in range(limit) if token not in exempt and _bytes(left, token) != _bytes(right, token)
    ]


def require_shared(student: Tokenizer, teacher: Tokenizer, limit: int, key: str) -> None:
    """Refuse to compare distributions whose first `limit` ids are not the same bytes.

    Args:
        student: the student's tokenizer, whose ids the data holds.
        teacher: the teacher's.
        limit: how many first ids are compared.
        key: recipe key for the message.

    Raises:
        ConfigError: names the first differing id with both spellings, and how far the vocabularies agree.
    """
    different = differing_ids(student, teacher, limit)
    if different:
        first = different[0]
        raise ConfigError(
            f"{key}: {len(different)} of the first {limit} ids are different bytes in {student.name} and "
            f"{teacher.name} (id {first}: {_bytes(student, first)!r} against {_bytes(teacher, first)!r}); "
            f"set shared_vocab_size to {first} or less, or choose a teacher with the student's tokenizer"
        )


def _bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    return tokenizer.token_bytes(token) if tokenizer.has(token) else None
