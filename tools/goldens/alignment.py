"""Replay of tokenkit_align.json: chunks of two token sequences against our byte rule.

Where the two template tables know different pieces, tokenkit's replacements fire on ordinary tokens and its
count of bytes restarts (bug 3 of spec section 9). `replaced` carries that rule out as the spec describes it;
a recorded alignment that is neither ours nor the one this bug gives is a failure.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from goldens.row import Row, judge
from goldens.text import golden_tokenizer
from tide_megatron.text.align import align_chats
from tide_megatron.text.backends.huggingface import byte_of_character
from tide_megatron.text.chat import Content, Encoded

CASE_KEYS = {
    *(f"{part}_{side}" for part in ("text", "kind", "ids", "tokens") for side in ("teacher", "student")),
    *("note", "chunks_checked", "chunks_unchecked"),
}
QWEN_PIECES = frozenset({b"\n", b"system", b"user", b"assistant"})
"""Ordinary tokens that a Qwen table takes for pieces of its template (spec section 4.1)."""
KINDS = {"GPT2": frozenset[bytes](), "Qwen2": QWEN_PIECES, "Qwen3": QWEN_PIECES}
REPLACED = "bug 3: a template table takes content tokens for template pieces and restarts its count"

Chunks = list[list[int]]
"""[teacher start, teacher end, student start, student end] of each chunk, as the reference orders them."""


def replay_alignments(path: Path) -> list[Row]:
    """Replay tokenkit_align.json: one row per pair of kinds, one more for each case that differs."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    if set(whole) != {"cases"}:
        return [Row(file=path.name, label="", status="failed", note=f"unknown keys: {sorted(whole)}")]
    table = byte_of_character()
    tokenizers = {side: golden_tokenizer(path.parent / "tokenizers", side) for side in ("teacher", "student")}
    by_kinds: dict[str, list[Row]] = {}
    for number, case in enumerate(whole["cases"]):
        kinds = f"{case['kind_teacher']}, {case['kind_student']}"
        label = f"case {number} ({kinds}): {case['text_student'][:24]!r}"
        if set(case) != CASE_KEYS:
            row = Row(file=path.name, label=label, status="failed", note="unknown or missing keys")
            by_kinds.setdefault(kinds, []).append(row)
            continue
        pieces = {
            side: [bytes(table[character] for character in token) for token in case[f"tokens_{side}"]]
            for side in tokenizers
        }
        spelled = {
            side: [tokenizer.token_bytes(token) for token in case[f"ids_{side}"]]
            for side, tokenizer in tokenizers.items()
        }
        row = judge(path.name, label, *_sides_of(case, pieces, spelled), bug=REPLACED)
        by_kinds.setdefault(kinds, []).append(row)
    rows = []
    for kinds, found in by_kinds.items():
        good = sum(row.status == "replayed" for row in found)
        note = f"{good} of {len(found)} cases equal"
        rows.append(
            Row(file=path.name, label=kinds, status="replayed" if good else "failed", error=0.0, note=note)
        )
        rows += [row for row in found if row.status != "replayed"]
    return rows


def _sides_of(
    case: dict[str, Any], pieces: dict[str, list[bytes]], spelled: dict[str, list[bytes]]
) -> tuple[Any, Any, Any]:
    """Return what was recorded, what we make of it, and what bug 3 makes of it."""
    teacher, student = even_spaces(pieces["teacher"], pieces["student"])
    recorded = (pieces, case["chunks_unchecked"], case["chunks_checked"])
    ours = byte_rule(teacher, student)
    kinds = case["kind_teacher"], case["kind_student"]
    theirs = replaced(teacher, student, kinds)
    blank = [
        [b"" if fires(piece, side, kinds) else piece for piece in row]
        for side, row in enumerate((teacher, student))
    ]
    return (
        recorded,
        (spelled, ours, same_bytes(ours, teacher, student)),
        (spelled, theirs, same_bytes(theirs, *blank)),
    )


def byte_rule(teacher: Sequence[bytes], student: Sequence[bytes]) -> Chunks:
    """Align by our rule: two encodings of one message that is all there is."""
    found = align_chats(_encoded(student), _encoded(teacher))
    return [[c.teacher_start, c.teacher_end, c.student_start, c.student_end] for c in found]


def _encoded(pieces: Sequence[bytes]) -> Encoded:
    ends = list(itertools.accumulate(map(len, pieces)))
    content = Content(start=0, end=ends[-1] if ends else 0, skipped=0)
    return Encoded(
        ids=list(range(len(ends))), replies=[0, len(ends)], reply_bytes=0, ends=ends, contents=[content]
    )


def same_bytes(chunks: Chunks, teacher: Sequence[bytes], student: Sequence[bytes]) -> Chunks:
    """Keep the chunks whose sides spell the same; ours do wherever both texts are one content."""
    return [[a, b, c, d] for a, b, c, d in chunks if b"".join(teacher[a:b]) == b"".join(student[c:d])]


def even_spaces(teacher: Sequence[bytes], student: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Give both sides as many leading spaces as the richer one has: the texts may differ in them."""
    if not teacher or not student:
        return list(teacher), list(student)
    texts = b"".join(teacher), b"".join(student)
    spaces = [len(text) - len(text.lstrip(b" ")) for text in texts]
    missing = [max(spaces) - own for own in spaces]
    return (
        [b" " * missing[0] + teacher[0], *teacher[1:]],
        [b" " * missing[1] + student[0], *student[1:]],
    )


def fires(piece: bytes, side: int, kinds: tuple[str, str]) -> bool:
    """Say whether a table replaces a token that the other table has no counterpart for."""
    return piece in KINDS[kinds[side]] and piece not in KINDS[kinds[1 - side]]


def replaced(teacher: Sequence[bytes], student: Sequence[bytes], kinds: tuple[str, str]) -> Chunks:
    """Align as tokenkit does: a replaced token is passed over and leaves no count behind it."""
    sides = (teacher, student)
    place, start, count = [0, 0], [0, 0], [0, 0]
    chunks = []
    while place[0] < len(teacher) and place[1] < len(student):
        skipped = next((side for side in (0, 1) if fires(sides[side][place[side]], side, kinds)), None)
        if skipped is not None:
            place[skipped], count[skipped] = place[skipped] + 1, 0
            continue
        reached = [count[side] + len(sides[side][place[side]]) for side in (0, 1)]
        for side in (0, 1):
            if reached[side] <= reached[1 - side]:
                place[side], count[side] = place[side] + 1, reached[side]
        if reached[0] == reached[1]:
            chunks.append([start[0], place[0], start[1], place[1]])
            start = list(place)
    return chunks
