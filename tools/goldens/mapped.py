"""Replays of chats as token ids: map_cross.json, map_shared.json, find_text.json.

Ids, labels, prompt lengths and who is left out must be equal. A range or pair that differs is excused only
where the reference's search, carried out, gives what was recorded, and a named fault led it astray.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from goldens.chats import SIDE, Chat, read_cross, read_shared
from goldens.conversation import FIRST, Conversation, Spelled
from goldens.row import Excuse, Row, judge
from goldens.text import golden_tokenizer
from tide_megatron.diffusion.batch import IGNORED
from tide_megatron.text.chat import labels_of

LAST_PAIR = "spec 4.2: the reference ends the teacher with its last aligned token; ours keeps the turn's end"


def replay_map_cross(path: Path) -> list[Row]:
    """Replay map_cross.json: ids and labels of both sides, and where each content stands in them."""
    rows = []
    for number, chat in enumerate(read_cross(path)):
        told, teacher = chat.told, chat.teacher.encoded
        recorded = {key: value for key, value in told.items() if key != "ranges"}
        ours = {
            **_student_of(chat),
            "teacher_input_ids": teacher.ids,
            "teacher_labels": labels_of(teacher.ids, teacher.replies, IGNORED),
        }
        if isinstance(chat.sample(), str):
            ours |= {"teacher_input_ids": [], "teacher_labels": []}
        rows.append(judge(path.name, f"row {number}: ids", recorded, ours))
        left_out = bool(ours["_discard"])
        found = chat.searched_ranges()
        ranges = [] if left_out else chat.ranges()
        label = f"row {number}: ranges"
        excuse = Excuse(bug=found.bug, spoilt=found.places, sound=chat.sound_ranges())
        rows.append(judge(path.name, label, told["ranges"], ranges, excuse))
    return rows


def replay_map_shared(path: Path) -> list[Row]:
    """Replay map_shared.json: ids of both templates, and which positions are the same token of a reply."""
    rows = []
    for number, chat in enumerate(read_shared(path)):
        told, ours, sample = chat.told, _student_of(chat), chat.sample()
        rows.append(judge(path.name, f"row {number}: ids", {key: told[key] for key in ours}, ours))
        left_out = isinstance(sample, str)
        teacher = [] if isinstance(sample, str) else sample.row[f"{SIDE}.ids"]
        found = chat.searched_pairs()
        ends_at = max((t + 1 for t, _ in found.places), default=len(chat.teacher.encoded.ids))
        whole = chat.teacher.encoded.ids
        bug = LAST_PAIR if ends_at < len(teacher) else ""
        excuse = Excuse(bug=bug, spoilt=whole[:ends_at], sound=whole[: chat.sound_end()])
        rows.append(
            judge(path.name, f"row {number}: teacher ids", told["teacher_input_ids"], teacher, excuse)
        )
        pairs = [] if left_out else chat.pairs()
        recorded = [list(pair) for pair in zip(told["align_teacher"], told["align_student"], strict=True)]
        excuse = Excuse(bug=found.bug, spoilt=found.places, sound=chat.sound_pairs())
        rows.append(judge(path.name, f"row {number}: pairs", recorded, pairs, excuse))
    return rows


def _student_of(chat: Chat) -> dict[str, Any]:
    """Return what the reference records of the student, as our data has it."""
    sample, prompt = chat.sample(), chat.student.encoded.prompt_tokens
    if isinstance(sample, str):
        return {"input_ids": [], "labels": [], "_discard": True, "prompt_len": prompt}
    ids = sample.row["ids"]
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
    for number, case in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        if set(case) != {"tokenizer", "tokens", "text", "range"}:
            raise ValueError(f"unknown or missing keys in case {number}")
        key = json.dumps([case["tokenizer"], case["tokens"], case["text"]])
        ours, excuse = _located(path, case, chats, seen[key])
        seen[key] += 1
        recorded = None if case["range"] is None else tuple(case["range"])
        label = f"case {number}: {case['tokenizer']}, {case['text'][:24]!r}"
        rows.append(judge(path.name, label, recorded, ours, excuse))
    return rows


def _located(path: Path, case: dict[str, Any], chats: list[Chat], turn: int) -> tuple[Any, Excuse]:
    """Return where we see a text, and where the reference does."""
    for chat in chats:
        side: Conversation = getattr(chat, case["tokenizer"])
        same = [m for m in chat.messages if side.messages[m]["content"] == case["text"]]
        if side.encoded.ids == case["tokens"] and turn < len(same):
            one = same[turn]
            excuse = Excuse(bug=side.fault(one), spoilt=side.searched(one), sound=side.sound_range(one))
            return side.range_of(one), excuse
    tokenizer = golden_tokenizer(path.parent / "tokenizers", case["tokenizer"])
    spelled = Spelled.of(tokenizer, case["tokens"])
    theirs = spelled.searched(case["text"])
    if spelled.text.count(case["text"]) != 1:
        return None, Excuse(bug=FIRST if theirs else "", spoilt=theirs, sound=None)
    start = spelled.text.index(case["text"])
    place = spelled.byte(start), spelled.byte(start + len(case["text"]))
    ours = spelled.inside(*place)
    return ours, Excuse(bug=spelled.fault(case["text"], place), spoilt=theirs, sound=ours)
