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

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from tide_megatron.base.errors import ConfigError
from tide_megatron.text.chat import Encoded
from tide_megatron.text.tokenizer import Tokenizer


class Chunk(NamedTuple):
    """Half-open token ranges that spell the same bytes."""

    student_start: int
    student_end: int
    teacher_start: int
    teacher_end: int


def align_chats(student: Encoded, teacher: Encoded, messages: Sequence[int] | None = None) -> list[Chunk]:
    """Cut the contents of a conversation into chunks, in order.

    Args:
        student: the conversation in the student's tokens and template.
        teacher: the same conversation in the teacher's.
        messages: which texts, by index (one a message where none has reasoning); None: all.
    """
    assert len(student.contents) == len(teacher.contents), "both sides hold the same conversation"
    chosen = range(len(student.contents)) if messages is None else messages
    return [
        chunk
        for message in chosen
        for chunk in align_boundaries(_boundaries(student, message), _boundaries(teacher, message))
    ]


def align_boundaries(left: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]]) -> list[Chunk]:
    """Cut at every boundary that both sides have.

    Args:
        left: (byte offset, number of the token that starts there) for each token boundary, ascending in
            both; the last one is the end of the last token. Of tokens without bytes the first counts.
        right: the same of the other side, in the same text.

    Returns:
        Chunks from the first common boundary to the last.
    """
    starts = dict(reversed(right))  # of several tokens at one offset the first
    common = [(offset, token, starts[offset]) for offset, token in _first(left) if offset in starts]
    return [
        Chunk(token, next_token, other, next_other)
        for (_, token, other), (_, next_token, next_other) in itertools.pairwise(common)
    ]


def _first(boundaries: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Keep the first token of each offset."""
    return sorted(dict(reversed(boundaries)).items())


def _boundaries(encoded: Encoded, message: int) -> list[tuple[int, int]]:
    """List the token boundaries inside a message's content, in offsets of the original content."""
    content = encoded.contents[message]
    shift = content.skipped - content.start
    first = bisect.bisect_left(encoded.ends, content.start)
    found = [(content.start + shift, 0)] if content.start == 0 else []
    for token in range(first, len(encoded.ends)):
        end = encoded.ends[token]
        if end > content.end:
            break
        found.append((end + shift, token + 1))
    return found


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
