"""Replays of tokenizers/: ids of plain texts and of rendered chats, with our tokenizer and templates.

The ids stand in tokenkit_align.json and map_cross.json; what those files hold beyond ids (chunks, ranges) is
replayed by `alignment` and `mapped`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from goldens.row import Row
from tide_megatron.text.templates import ChatTemplate
from tide_megatron.text.tokenizer import Tokenizer


def golden_tokenizer(folder: Path, side: str, template: str | None = None) -> Tokenizer:
    """Load `student` or `teacher` from tokenizers/, with its template of info.json or another one."""
    info = _read(folder / "info.json")
    special = info[f"{side}_special"]
    tokenizer = Tokenizer.load(
        folder / f"{side}.json", mask=special["mask"], eos=special["eos"], pad=special["pad"]
    )
    source = info[f"{side}_chat_template"] if template is None else template
    chat = ChatTemplate(source=source, origin="info.json", variables={}, special_tokens={})
    return dataclasses.replace(tokenizer, chat=chat)


def replay_tokenizers(folder: Path) -> list[Row]:
    """Replay the tokenizers of a goldens folder on the texts and chats whose ids its other files hold."""
    texts = _read(folder.parent / "tokenkit_align.json")["cases"]
    chats = _read(folder.parent / "map_cross.json")
    rows = []
    for side, column, limit in (
        ("student", "input_ids", chats["max_length"]),
        ("teacher", "teacher_input_ids", None),  # the reference cuts the teacher's ids later
    ):
        tokenizer = golden_tokenizer(folder, side)
        right = [_same_text(tokenizer, case, side) for case in texts]
        rows.append(_row(f"{side}.json", "ids of texts", right))
        assert tokenizer.chat is not None, "it was given one"
        right = [
            tokenizer.encode(tokenizer.chat.render(chat["messages"], add_generation_prompt=False))[:limit]
            == ids[column]
            for chat, ids in zip(chats["rows"], chats["mapped"], strict=True)
            if not ids["_discard"]
        ]
        rows.append(_row("info.json", f"ids of chats, {side}", right))
    known = {"student.json", "teacher.json", "info.json"}
    return rows + [
        Row(
            file=f"tokenizers/{path.name}", label="", status="failed", note="unknown file: nothing replays it"
        )
        for path in sorted(folder.iterdir())
        if path.name not in known
    ]


def _same_text(tokenizer: Tokenizer, case: dict[str, Any], side: str) -> bool:
    """Say whether a text has the recorded ids; "truncated" cases hold only the first ones of one side."""
    ids = tokenizer.encode(case[f"text_{side}"])
    golden = case[f"ids_{side}"]
    return ids == golden or ("truncated" in case["note"] and ids[: len(golden)] == golden)


def _row(file: str, label: str, right: list[bool]) -> Row:
    """Make a row from one verdict per item; nothing to compare is a failure too."""
    wrong = right.count(False)
    passed = bool(right) and not wrong
    return Row(
        file=f"tokenizers/{file}",
        label=label,
        status="replayed" if passed else "failed",
        error=float(wrong),
        note="" if passed else f"{wrong} of {len(right)} differ",
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
