"""Samples as they were made before that was made fast: boundaries in dictionaries, chunk after chunk.

The oracle's half for alignment and columns; see `tests/plain_chat.py`.
"""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Sequence

from tests.plain_chat import PlainEncoded, encode_chat
from tide_megatron.data.preparation.rejects import TooLong
from tide_megatron.data.preparation.sample import Encoder, OnLong, Sample, Window
from tide_megatron.data.sources.record import ChatRecord
from tide_megatron.text.align import Chunk


def plain_sample(encoder: Encoder, record: ChatRecord) -> Sample | str:
    """Encode one record, or say why it is left out.

    Raises:
        RecordError: it cannot be encoded; `TooLong`: it is longer than it may be.
    """
    messages, inputs, learnt = record.messages, record.inputs, record.learnt
    whole = encode_chat(encoder.tokenizer, messages, inputs=inputs, learnt=learnt, aligned=True)
    if reason := _reason_to_skip(whole, encoder.window):
        return reason
    limit = encoder.window.max_length
    encoded = encode_chat(
        encoder.tokenizer, messages, inputs=inputs, learnt=learnt, max_tokens=limit, aligned=True
    )
    is_cut = len(whole.ids) > limit
    sample = Sample(
        row={"ids": encoded.ids, "replies": encoded.replies, "reply_bytes": [encoded.reply_bytes]},
        counts=_counts(encoded, is_cut=is_cut),
        side_counts={},
        longest={"": len(encoded.ids)},
    )
    if encoder.window.on_long is OnLong.TRUNCATE:
        sample.row["cut"] = [int(is_cut)]
    for name, side in encoder.sides.items():
        teacher = encode_chat(side.tokenizer, messages, inputs=inputs, learnt=learnt, aligned=True)
        row, counts = plain_side(encoded, teacher, encoder.side_length(name), student_is_cut=is_cut)
        sample.row.update({f"{name}.{part}": values for part, values in row.items()})
        sample.longest[name], sample.side_counts[name] = counts["tokens"], counts
    return sample


def plain_side(
    student: PlainEncoded, teacher: PlainEncoded, limit: int, *, student_is_cut: bool
) -> tuple[dict[str, list[int]], collections.Counter[str]]:
    """Return one side's columns and counts."""
    chunks = [chunk for chunk in align_chats(student, teacher) if chunk.teacher_end <= limit]
    end = len(teacher.ids)
    if student_is_cut or end > limit:
        end = max((chunk.teacher_end for chunk in chunks), default=min(end, limit))
    learnt = [chunk for chunk in chunks if _is_within(chunk, student.replies)]
    row = {
        "ids": teacher.ids[:end],
        "replies": _cut_ranges(teacher.replies, end),
        "cut": [int(end < len(teacher.ids))],
        "chunks": [place for chunk in learnt for place in chunk],
    }
    return row, collections.Counter(
        tokens=end,
        chunks=len(learnt),
        pairs=sum(_is_pair(chunk, student, teacher) for chunk in learnt),
        aligned_bytes=sum(student.ends[chunk.student_end - 1] - _start(student, chunk) for chunk in learnt),
        cut=int(end < len(teacher.ids)),
        without_chunks=int(not learnt),
    )


def _is_within(chunk: Chunk, replies: Sequence[int]) -> bool:
    """Say whether a chunk's student tokens are of one reply."""
    ranges = zip(replies[::2], replies[1::2], strict=True)
    return any(start <= chunk.student_start and chunk.student_end <= end for start, end in ranges)


def _cut_ranges(ranges: Sequence[int], end: int) -> list[int]:
    """Cut flat ranges (start, end, start, ...) at `end`; what is behind it goes, but the first stays."""
    kept = max(1, sum(start < end for start in ranges[::2]))
    return [min(place, end) for place in ranges[: 2 * kept]]


def _is_pair(chunk: Chunk, student: PlainEncoded, teacher: PlainEncoded) -> bool:
    """Say whether a chunk is one token of the same id on both sides."""
    is_single = chunk.student_end - chunk.student_start == chunk.teacher_end - chunk.teacher_start == 1
    return is_single and student.ids[chunk.student_start] == teacher.ids[chunk.teacher_start]


def _start(encoded: PlainEncoded, chunk: Chunk) -> int:
    """Return the byte at which a chunk's student tokens start."""
    return encoded.ends[chunk.student_start - 1] if chunk.student_start else 0


def _reason_to_skip(encoded: PlainEncoded, window: Window) -> str | None:
    """Say why a record is left out (None: it is not), or refuse it."""
    length = len(encoded.ids)
    if length <= window.max_length:
        return None
    if window.on_long is OnLong.ERROR:
        raise TooLong(length, window.max_length)
    if window.on_long is OnLong.SKIP:
        return "longer than max_length"
    return "prompt fills max_length" if encoded.replies[0] >= window.max_length else None


def _counts(encoded: PlainEncoded, *, is_cut: bool) -> collections.Counter[str]:
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


def align_chats(
    student: PlainEncoded, teacher: PlainEncoded, messages: Sequence[int] | None = None
) -> list[Chunk]:
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


def _boundaries(encoded: PlainEncoded, message: int) -> list[tuple[int, int]]:
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
