"""Preparation the reference's way, frozen: what `tide prepare` is measured against.

Written from the description of the reference (spec sections 4.1 and 9), not from its code. Each sample is
rendered and tokenized by both tokenizers of `transformers`, each content is looked for in the decoded text,
and in the collator, every epoch anew, a loop with two pointers walks over the token strings of every content
in Python. Lighter than the reference: no table of template words, no padding, no matrices.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

IGNORED = -100
SPACE = "Ġ"
Span = tuple[int, int]
Chunk = tuple[int, int, int, int]
"""Half-open: teacher start, end, student start, end."""
Chat = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mapped:
    """One sample as it is kept between the epochs."""

    ids: list[int]
    labels: list[int]
    teacher_ids: list[int]
    ranges: list[tuple[Span, Span]]
    """Of each content: its tokens in the teacher's and in the student's ids."""


def map_chat(
    chat: Chat, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, max_length: int
) -> Mapped | None:
    """Tokenize a chat on both sides and find its contents; None: the prompt fills the window."""
    ids = _templated(student, chat)
    prompt = _templated(student, chat[:-1], add_generation_prompt=True)
    teacher_ids = _templated(teacher, chat)
    if len(prompt) >= max_length:
        return None
    ranges = []
    for message in chat:
        content = message["content"]
        if content.strip():
            theirs, mine = find_text(teacher, teacher_ids, content), find_text(student, ids, content)
            if theirs and mine and _text(teacher, teacher_ids, theirs) == _text(student, ids, mine):
                ranges.append((theirs, mine))
    labels = [IGNORED] * min(len(prompt), len(ids)) + ids[len(prompt) :]
    return Mapped(ids=ids[:max_length], labels=labels[:max_length], teacher_ids=teacher_ids, ranges=ranges)


def find_text(tokenizer: PreTrainedTokenizerFast, ids: list[int], text: str) -> Span | None:
    """Return the tokens of the first place at which a text occurs in the decoded ids."""
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    start = decoded.find(text)
    if start < 0:
        return None
    end = start + len(text)
    again = tokenizer(decoded, add_special_tokens=False, return_offsets_mapping=True)
    places = again["offset_mapping"] if again["input_ids"] == ids else _places_one_by_one(tokenizer, ids)
    first = last = None
    for token, (begin, stop) in enumerate(places):
        if first is None and begin <= start < stop:
            first = token
        if begin < end <= stop:
            last = token + 1
            break
        if begin >= end:
            last = token
            break
    return None if first is None or last is None else (first, last)


def chunks_of(
    mapped: Mapped, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> list[Chunk]:
    """Align every range of a sample, as the collator does whenever it meets the sample."""
    found = []
    for (t0, t1), (s0, s1) in mapped.ranges:
        if s0 >= len(mapped.ids):
            continue
        theirs = teacher.convert_ids_to_tokens(mapped.teacher_ids[t0:t1])
        mine = student.convert_ids_to_tokens(mapped.ids[s0 : min(s1, len(mapped.ids))])
        found += [(t0 + a, t0 + b, s0 + c, s0 + d) for a, b, c, d in two_pointers(theirs, mine)]
    return found


def two_pointers(teacher: list[str], student: list[str]) -> list[Chunk]:
    """Cut two lists of token strings wherever both have spelt equally many characters (bytes)."""
    teacher, student = _even_spaces(teacher, student)
    found = []
    i = j = first_i = first_j = 0
    count_t: dict[int, int] = {}
    count_s: dict[int, int] = {}
    while i < len(teacher) and j < len(student):
        count_t[i] = count_t.get(i - 1, 0) + len(teacher[i])
        count_s[j] = count_s.get(j - 1, 0) + len(student[j])
        if count_t[i] == count_s[j]:
            i, j = i + 1, j + 1
            found.append((first_i, i, first_j, j))
            first_i, first_j = i, j
        elif count_t[i] < count_s[j]:
            i += 1
        else:
            j += 1
    return [
        chunk
        for chunk in found
        if "".join(teacher[chunk[0] : chunk[1]]) == "".join(student[chunk[2] : chunk[3]])
    ]


def _even_spaces(teacher: list[str], student: list[str]) -> tuple[list[str], list[str]]:
    """Put spaces in front of the side that has fewer."""
    spaces = [len(text) - len(text.lstrip(SPACE)) for text in ("".join(teacher), "".join(student))]
    most = max(spaces)
    return tuple(  # type: ignore[return-value]
        [SPACE * (most - own) + tokens[0], *tokens[1:]] if tokens else tokens
        for own, tokens in zip(spaces, (teacher, student), strict=True)
    )


def _templated(tokenizer: PreTrainedTokenizerFast, chat: Chat, **options: Any) -> list[int]:
    ids = tokenizer.apply_chat_template(
        list(chat), tokenize=True, return_dict=False, enable_thinking=False, **options
    )
    return list(ids)


def _text(tokenizer: PreTrainedTokenizerFast, ids: list[int], span: Span) -> str:
    return str(tokenizer.decode(ids[slice(*span)], clean_up_tokenization_spaces=False)).strip()


def _places_one_by_one(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[Span]:
    """Return the characters that each token adds to the decoded text, by decoding every prefix."""
    ends = [
        len(tokenizer.decode(ids[:number], clean_up_tokenization_spaces=False))
        for number in range(len(ids) + 1)
    ]
    return list(itertools.pairwise(ends))
