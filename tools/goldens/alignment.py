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

from tokenizers.pre_tokenizers import ByteLevel

from goldens.row import Excuse, Row, judge
from goldens.text import golden_tokenizer
from tide_megatron.text.align import align_chats
from tide_megatron.text.chat import Encoded
from tide_megatron.text.templates import Content
from tide_megatron.text.tokenizer import Tokenizer

CASE_KEYS = {
    *(f"{part}_{side}" for part in ("text", "kind", "ids", "tokens") for side in ("teacher", "student")),
    *("note", "chunks_checked", "chunks_unchecked"),
}
QWEN_PIECES = frozenset({b"\n", b"system", b"user", b"assistant"})
"""Ordinary tokens that a Qwen table takes for pieces of its template (spec section 4.1)."""
KINDS = {"GPT2": frozenset[bytes](), "Qwen2": QWEN_PIECES, "Qwen3": QWEN_PIECES}
ALPHABET = ByteLevel(add_prefix_space=False, use_regex=False)
REPLACED = "bug 3: a template table takes content tokens for template pieces and restarts its count"

Chunks = list[list[int]]
"""[teacher start, teacher end, student start, student end] of each chunk, as the reference orders them."""


def replay_alignments(path: Path) -> list[Row]:
    """Replay tokenkit_align.json: one row per pair of kinds, one more for each case that differs."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    if set(whole) != {"cases"}:
        return [Row(file=path.name, label="", status="failed", note=f"unknown keys: {sorted(whole)}")]
    tokenizers = {side: golden_tokenizer(path.parent / "tokenizers", side) for side in ("teacher", "student")}
    by_kinds: dict[str, list[Row]] = {}
    for number, case in enumerate(whole["cases"]):
        kinds = f"{case['kind_teacher']}, {case['kind_student']}"
        label = f"case {number} ({kinds}): {case['text_student'][:24]!r}"
        if set(case) != CASE_KEYS:
            row = Row(file=path.name, label=label, status="failed", note="unknown or missing keys")
            by_kinds.setdefault(kinds, []).append(row)
            continue
        row = _judge_case((path.name, label), case, tokenizers)
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


def _judge_case(name: tuple[str, str], case: dict[str, Any], tokenizers: dict[str, Tokenizer]) -> Row:
    """Compare how all tokens are spelled, and the chunks with and without the check for equal bytes."""
    pieces = {
        side: [tokenizer.token_bytes(token) for token in case[f"ids_{side}"]]
        for side, tokenizer in tokenizers.items()
    }
    spelled = [_in_alphabet(pieces[side], case[f"text_{side}"]) for side in pieces]
    recorded = [case[f"tokens_{side}"] for side in pieces]
    teacher, student = even_spaces(pieces["teacher"], pieces["student"])
    kinds = case["kind_teacher"], case["kind_student"]
    spoilt, sound, ours = (
        replaced(teacher, student, kinds),
        replaced(teacher, student),
        byte_rule(teacher, student),
    )
    blank = blanked((teacher, student), kinds)
    fired = blank != [teacher, student]
    return judge(
        *name,
        (recorded, case["chunks_unchecked"], case["chunks_checked"]),
        (spelled, ours, same_bytes(ours, teacher, student)),
        Excuse(
            bug=REPLACED if fired else "",
            spoilt=(spelled, spoilt, same_bytes(spoilt, *blank)),
            sound=(spelled, sound, same_bytes(sound, teacher, student)),
        ),
    )


def _in_alphabet(pieces: Sequence[bytes], text: str) -> list[str]:
    """Write tokens that spell the front of a text in the byte-level alphabet; [] if they do not."""
    whole = b"".join(pieces)
    if text.encode()[: len(whole)] != whole:
        return []
    written = "".join(part for part, _ in ALPHABET.pre_tokenize_str(text))  # one character a byte
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    return [written[start:end] for start, end in itertools.pairwise(ends)]


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


def blanked(sides: Sequence[list[bytes]], kinds: tuple[str, str]) -> list[list[bytes]]:
    """Empty the tokens that tokenkit replaces; its check compares what is left."""
    return [[b"" if _fires(piece, side, kinds) else piece for piece in row] for side, row in enumerate(sides)]


def _fires(piece: bytes, side: int, kinds: tuple[str, str] | None) -> bool:
    """Say whether a table replaces a token that the other table has no counterpart for."""
    return kinds is not None and piece in KINDS[kinds[side]] and piece not in KINDS[kinds[1 - side]]


def replaced(
    teacher: Sequence[bytes], student: Sequence[bytes], kinds: tuple[str, str] | None = None
) -> Chunks:
    """Align as tokenkit does: a replaced token is passed over and leaves no count behind it.

    Args:
        teacher: bytes of each token.
        student: the same.
        kinds: template tables of both; None: no token is replaced, which is the byte rule.
    """
    sides = (teacher, student)
    place, start, count = [0, 0], [0, 0], [0, 0]
    chunks = []
    while place[0] < len(teacher) and place[1] < len(student):
        skipped = next((side for side in (0, 1) if _fires(sides[side][place[side]], side, kinds)), None)
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
