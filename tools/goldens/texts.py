"""Replays of texts and chats as token ids: tokenizers/, tokenkit_align.json, map_*.json, find_text.json.

Ids, labels, prompt lengths and who is left out must be equal. What else differs is excused only where ours is
as it should be and the recorded value itself shows the named bug of the reference.
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from tokenizers.pre_tokenizers import ByteLevel

from goldens.chats import SIDE, Chat, Conversation, Span, golden_tokenizer, inside, read_cross, read_shared
from goldens.chunks import REPLACED, Chunks, blanked, even_spaces, replaced, same_bytes
from goldens.row import Row, judge
from tide_megatron.diffusion.batch import IGNORED
from tide_megatron.text.align import align_chats
from tide_megatron.text.chat import Encoded, labels_of
from tide_megatron.text.templates.places import Content
from tide_megatron.text.tokenizer import Tokenizer

SIDES = ("teacher", "student")
ALIGNED_KEYS = {
    *(f"{part}_{side}" for part in ("text", "kind", "ids", "tokens") for side in SIDES),
    *("note", "chunks_checked", "chunks_unchecked"),
}
ALPHABET = ByteLevel(add_prefix_space=False, use_regex=False)
FIRST = "bug 2: first-occurrence search finds an equal text elsewhere"
LAST_PAIR = "spec 4.2: the reference ends the teacher with its last aligned token; ours keeps the turn's end"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def replay_tokenizers(folder: Path) -> list[Row]:
    """Replay the tokenizers and templates on the texts and chats whose ids the folder's other files hold."""
    texts, chats = (
        _json(folder.parent / "tokenkit_align.json")["cases"],
        _json(folder.parent / "map_cross.json"),
    )
    rows = []
    for side, column, limit in (
        ("student", "input_ids", chats["max_length"]),
        ("teacher", "teacher_input_ids", None),  # the reference cuts the teacher's ids later
    ):
        tokenizer = golden_tokenizer(folder, side)
        wrong = [case for case in texts if not _same_text(tokenizer, case, side)]
        rows.append(_counted(f"tokenizers/{side}.json", "ids of texts", len(texts), len(wrong)))
        told = [
            (row, ids) for row, ids in zip(chats["rows"], chats["mapped"], strict=True) if not ids["_discard"]
        ]
        assert tokenizer.chat is not None, "it was given one"
        rendered = [tokenizer.chat.render(row["messages"], add_generation_prompt=False) for row, _ in told]
        wrong = [
            ids
            for text, (_, ids) in zip(rendered, told, strict=True)
            if tokenizer.encode(text)[:limit] != ids[column]
        ]
        rows.append(_counted("tokenizers/info.json", f"ids of chats, {side}", len(told), len(wrong)))
    unknown = sorted({path.name for path in folder.iterdir()} - {"student.json", "teacher.json", "info.json"})
    note = "unknown file: nothing replays it"
    return rows + [Row(file=f"tokenizers/{name}", label="", status="failed", note=note) for name in unknown]


def _same_text(tokenizer: Tokenizer, case: dict[str, Any], side: str) -> bool:
    """Say whether a text has the recorded ids; "truncated" cases hold only the first ones of one side."""
    ids, golden = tokenizer.encode(case[f"text_{side}"]), case[f"ids_{side}"]
    return ids == golden or ("truncated" in case["note"] and ids[: len(golden)] == golden)


def _counted(file: str, label: str, number: int, wrong: int) -> Row:
    """Make a row from how many items differ; nothing to compare is a failure too."""
    passed = number > 0 and not wrong
    note = "" if passed else f"{wrong} of {number} differ"
    return Row(
        file=file, label=label, status="replayed" if passed else "failed", error=float(wrong), note=note
    )


def replay_alignments(path: Path) -> list[Row]:
    """Replay tokenkit_align.json: one row per pair of kinds, one more for each case that differs."""
    whole = _json(path)
    if set(whole) != {"cases"}:
        return [Row(file=path.name, label="", status="failed", note=f"unknown keys: {sorted(whole)}")]
    tokenizers = {side: golden_tokenizer(path.parent / "tokenizers", side) for side in SIDES}
    by_kinds: dict[str, list[Row]] = {}
    for number, case in enumerate(whole["cases"]):
        kinds = f"{case['kind_teacher']}, {case['kind_student']}"
        label = f"case {number} ({kinds}): {case['text_student'][:24]!r}"
        if set(case) == ALIGNED_KEYS:
            row = _judge_alignment(path.name, label, case, tokenizers)
        else:
            row = Row(file=path.name, label=label, status="failed", note="unknown or missing keys")
        by_kinds.setdefault(kinds, []).append(row)
    rows = []
    for kinds, found in by_kinds.items():
        others = [row for row in found if row.status != "replayed"]
        good = len(found) - len(others)
        note = f"{good} of {len(found)} cases equal"
        status = "replayed" if good else "failed"
        rows += [Row(file=path.name, label=kinds, status=status, error=0.0, note=note), *others]
    return rows


def _judge_alignment(file: str, label: str, case: dict[str, Any], tokenizers: dict[str, Tokenizer]) -> Row:
    """Compare how all tokens are spelled, and the chunks with and without the check for equal bytes."""
    pieces = [[tokenizers[side].token_bytes(token) for token in case[f"ids_{side}"]] for side in SIDES]
    spelled = [_in_alphabet(own, case[f"text_{side}"]) for own, side in zip(pieces, SIDES, strict=True)]
    recorded = [case[f"tokens_{side}"] for side in SIDES]
    both, kinds = even_spaces(*pieces), (case["kind_teacher"], case["kind_student"])
    blank, chunks = blanked(both, kinds), byte_rule(*both)
    told = (recorded, case["chunks_unchecked"], case["chunks_checked"])
    ours = (spelled, chunks, same_bytes(chunks, *both))
    spoilt, sound = replaced(*both, kinds), replaced(*both)
    is_replaced = (
        blank != [*both] and told == (spelled, spoilt, same_bytes(spoilt, *blank)) and chunks == sound
    )
    return judge(file, label, told, ours, REPLACED if is_replaced else "")


def _in_alphabet(pieces: Sequence[bytes], text: str) -> list[str]:
    """Write tokens that spell the front of a text in the byte-level alphabet; [] if they do not."""
    whole = b"".join(pieces)
    if text.encode()[: len(whole)] != whole:
        return []
    written = "".join(part for part, _ in ALPHABET.pre_tokenize_str(text))  # one character a byte
    ends = itertools.accumulate(map(len, pieces), initial=0)
    return [written[start:end] for start, end in itertools.pairwise(ends)]


def byte_rule(teacher: Sequence[bytes], student: Sequence[bytes]) -> Chunks:
    """Align by our rule: two encodings of one message that is all there is."""
    found = align_chats(_encoded(student), _encoded(teacher))
    return [[c.teacher_start, c.teacher_end, c.student_start, c.student_end] for c in found]


def _encoded(pieces: Sequence[bytes]) -> Encoded:
    ends, number = list(itertools.accumulate(map(len, pieces))), len(pieces)
    content = Content(start=0, end=ends[-1] if ends else 0, skipped=0)
    return Encoded(
        ids=[*range(number)],
        replies=[0, number],
        reply_bytes=0,
        uncut_tokens=number,
        ends=numpy.array(ends, dtype=numpy.int64),
        contents=[content],
    )


def replay_map_cross(path: Path) -> list[Row]:
    """Replay map_cross.json: ids and labels of both sides, and where each content stands in them."""
    rows = []
    for number, chat in enumerate(read_cross(path)):
        told, teacher, ours = chat.told, chat.teacher.encoded, _student_of(chat)
        is_left_out = ours["_discard"]
        ours["teacher_input_ids"] = [] if is_left_out else teacher.ids
        ours["teacher_labels"] = [] if is_left_out else labels_of(teacher.ids, teacher.replies, IGNORED)
        recorded = {key: value for key, value in told.items() if key != "ranges"}
        rows.append(judge(path.name, f"row {number}: ids", recorded, ours))
        recorded, ranges = told["ranges"], [] if is_left_out else chat.ranges()
        bug = FIRST if ranges and _are_first_hits(chat, recorded) else ""
        rows.append(judge(path.name, f"row {number}: ranges", recorded, ranges, bug))
    return rows


def _are_first_hits(chat: Chat, recorded: list[list[int]]) -> bool:
    """Say whether ranges are ours; where an equal text stands earlier, they may be that one's, or missing."""
    sides, left = (chat.teacher, chat.student), [*recorded]
    for message in chat.messages:
        spans = [tuple(left[0][:2]), tuple(left[0][2:])] if left else []
        found = [
            span == side.range_of(message) or side.stands_earlier(message, span)
            for side, span in zip(sides, spans, strict=False)
        ]
        if found and all(found):
            left.pop(0)
        elif not any(side.stands_earlier(message) for side in sides):
            return False
    return not left


def replay_map_shared(path: Path) -> list[Row]:
    """Replay map_shared.json: ids of both templates, and which positions are the same token of a reply."""
    rows = []
    for number, chat in enumerate(read_shared(path)):
        told, ours, sample = chat.told, _student_of(chat), chat.sample()
        rows.append(judge(path.name, f"row {number}: ids", {key: told[key] for key in ours}, ours))
        recorded = [list(pair) for pair in zip(told["align_teacher"], told["align_student"], strict=True)]
        teacher, stored, pairs = told["teacher_input_ids"], [], []
        if not isinstance(sample, str):
            stored, pairs = sample.row[f"{SIDE}.ids"].tolist(), chat.pairs(chat.chunks(messages=chat.replies))
        whole, end = chat.teacher.ids, 1 + max((t for t, _ in recorded), default=-1)
        is_last = end < len(stored) and teacher == whole[:end] and stored == whole[: chat.sound_end()]
        bug = LAST_PAIR if is_last else ""
        rows.append(judge(path.name, f"row {number}: teacher ids", teacher, stored, bug))
        bug = FIRST if pairs_are_earlier(chat, recorded, pairs) else ""
        rows.append(judge(path.name, f"row {number}: pairs", recorded, pairs, bug))
    return rows


def pairs_are_earlier(chat: Chat, recorded: list[list[int]], ours: list[list[int]]) -> bool:
    """Say whether pairs are as many equal tokens as ours, which are sound, and none stands later."""
    if ours != chat.pairs(chat.sound_chunks(messages=chat.replies)) or len(recorded) != len(ours):
        return False
    theirs, mine = chat.teacher.ids, chat.student.ids
    return all(
        theirs[t] == theirs[other_t] and mine[s] == mine[other_s] and t <= other_t and s <= other_s
        for (t, s), (other_t, other_s) in zip(recorded, ours, strict=True)
    )


def _student_of(chat: Chat) -> dict[str, Any]:
    """Return what the reference records of the student, as our data has it."""
    sample, prompt = chat.sample(), chat.student.encoded.prompt_tokens
    if isinstance(sample, str):
        return {"input_ids": [], "labels": [], "_discard": True, "prompt_len": prompt}
    ids = sample.row["ids"].tolist()
    labels = labels_of(ids, sample.row["replies"], IGNORED)
    return {"input_ids": ids, "labels": labels, "_discard": False, "prompt_len": prompt}


def replay_find_text(path: Path) -> list[Row]:
    """Replay find_text.json: the range of a content within the ids of its chat.

    A case belongs to the chat of map_cross.json that has its ids; of equal contents in one chat the first
    case means the first message. Ids of no such chat mean the only occurrence of the text.
    """
    chats = read_cross(path.parent / "map_cross.json")
    seen: collections.Counter[str] = collections.Counter()
    rows = []
    for number, case in enumerate(_json(path)):
        if set(case) != {"tokenizer", "tokens", "text", "range"}:
            raise ValueError(f"unknown or missing keys in case {number}")
        key = json.dumps([case["tokenizer"], case["tokens"], case["text"]])
        recorded = None if case["range"] is None else tuple(case["range"])
        ours, bug = _located(path, case, chats, seen[key])
        seen[key] += 1
        label = f"case {number}: {case['tokenizer']}, {case['text'][:24]!r}"
        rows.append(judge(path.name, label, recorded, ours, bug))
    return rows


def _located(path: Path, case: dict[str, Any], chats: list[Chat], turn: int) -> tuple[Span | None, str]:
    """Return where we see a text, and the bug that explains another place."""
    for chat in chats:
        side: Conversation = getattr(chat, case["tokenizer"])
        same = [m for m in chat.messages if side.messages[m]["content"] == case["text"]]
        if side.ids == case["tokens"] and turn < len(same):
            is_first = case["range"] and side.stands_earlier(same[turn], tuple(case["range"]))
            return side.range_of(same[turn]), FIRST if is_first else ""
    tokenizer = golden_tokenizer(path.parent / "tokenizers", case["tokenizer"])
    pieces = [tokenizer.token_bytes(token) for token in case["tokens"]]
    whole, text = b"".join(pieces), case["text"].encode()
    if whole.count(text) != 1:
        return None, ""
    start = whole.index(text)
    return inside([*itertools.accumulate(map(len, pieces))], start, start + len(text)), ""
