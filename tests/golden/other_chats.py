"""Files of a second goldens folder that hold texts and chats: other templates, messages, windows and limits.

The tokenizers of the first folder change sides. Everything is worked out the reference's way from the spec
(sections 4.1 and 4.2) with the tokenizers library and Jinja alone, faults included.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers

MAX_LENGTH, BLOCK, TEACHER_LIMIT = 56, 7, 24
STUDENT = (
    "<role>start</role>{% for m in messages %}<role>{{ m['role'] }}</role>{{ m['content'] }}<|role_end|>"
    "{% endfor %}{% if add_generation_prompt %}<role>assistant</role>{% endif %}"
)
TEACHER = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ ': ' if m['role'] == 'user' else '\\n' }}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONGER = (
    "<role>be kind</role>{% for m in messages %}<role>{{ m['role'] | upper }}</role>{{ m['content'] }}"
    "<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
TURNS = [
    ["Where is the café?", "Go left, then right.\r\nIt is near!"],
    ["It says assistant", "assist"],
    ["Why a party? 🎉", "We won 3 to 2 🎉"],
    ["One more", "Yes", "And another one", "No. That was the last one for today, as you know."],
    ["Count", "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"],
    [" ".join(["very"] * 60), "left out"],
]
SPECIAL = {
    "student": {"eos": "<|role_end|>", "pad": "<|endoftext|>", "mask": "<|mask|>"},
    "teacher": {"eos": "<|im_end|>", "pad": "<|endoftext|>", "mask": "<|mask|>"},
}


class Seen:
    """A rendered chat in one tokenizer, as the reference sees it."""

    def __init__(self, tokenizer: Any, template: str, messages: list[dict[str, str]]) -> None:
        self.messages = messages
        program = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        self.text = program.render(messages=messages, add_generation_prompt=False)
        encoding = tokenizer.encode(self.text, add_special_tokens=False)
        self.ids, self.offsets, self.tokens = encoding.ids, encoding.offsets, encoding.tokens
        prompt = program.render(messages=messages[:-1], add_generation_prompt=True)
        self.prompt = len(tokenizer.encode(prompt, add_special_tokens=False).ids)

    @property
    def labels(self) -> list[int]:
        return [-100] * self.prompt + self.ids[self.prompt :]

    def find(self, content: str) -> tuple[int, int] | None:
        """Search from the front; a token for the first character, one for the last."""
        at = self.text.find(content)
        if at < 0:
            return None
        first = [n for n, (a, b) in enumerate(self.offsets) if a <= at < b]
        last = [n for n, (a, b) in enumerate(self.offsets) if a < at + len(content) <= b]
        return (first[0], last[0] + 1) if first and last else None


def minimal_chunks(teacher: list[str], student: list[str]) -> list[list[int]]:
    """Cut two byte-level spellings at all common places; drop what is unequal."""
    sides = [list(teacher), list(student)]
    if teacher and student:
        spaces = [len("".join(side)) - len("".join(side).lstrip("Ġ")) for side in sides]
        for side, own in zip(sides, spaces, strict=True):
            side[0] = "Ġ" * (max(spaces) - own) + side[0]
    lengths = [[len("".join(side[:n])) for n in range(len(side) + 1)] for side in sides]
    common = [place for place in lengths[0] if place in lengths[1]]
    cuts = [[side.index(place) for side in lengths] for place in common]
    found = [[a, c, b, d] for (a, b), (c, d) in itertools.pairwise(cuts)]
    return [[a, b, c, d] for a, b, c, d in found if "".join(sides[0][a:b]) == "".join(sides[1][c:d])]


def write_other_chats(goldens: Path, folder: Path) -> None:
    """Write tokenizers, map_*, collate_*, find_text and tokenkit_align of chats that `goldens` has not."""
    (folder / "tokenizers").mkdir()
    own = {"student": "teacher", "teacher": "student"}
    tools = {}
    for side, source in own.items():
        shutil.copy(goldens / "tokenizers" / f"{source}.json", folder / "tokenizers" / f"{side}.json")
        tools[side] = tokenizers.Tokenizer.from_file(str(folder / "tokenizers" / f"{side}.json"))
    info = {f"{side}_special": SPECIAL[side] for side in own}
    info |= {"student_chat_template": STUDENT, "teacher_chat_template": TEACHER}
    write(folder / "tokenizers" / "info.json", info)
    rows = [
        [
            {"role": "assistant" if place % 2 else "user", "content": content}
            for place, content in enumerate(turns)
        ]
        for turns in TURNS
    ]
    write_cross(folder, tools, rows)
    write_shared(folder, tools, rows)
    cases = [
        {"tokenizer": side, "tokens": seen.ids, "text": m["content"], "range": seen.find(m["content"])}
        for row in rows
        for side, template in (("student", STUDENT), ("teacher", TEACHER))
        for seen in [Seen(tools[side], template, row)]
        for m in row
    ]
    write(folder / "find_text.json", cases)
    write(
        folder / "tokenkit_align.json", {"cases": [alignment(tools, text) for turn in TURNS for text in turn]}
    )


def alignment(tools: dict[str, Any], text: str) -> dict[str, Any]:
    """Align one plain text of two kinds without pieces."""
    seen = {side: tool.encode(text, add_special_tokens=False) for side, tool in tools.items()}
    chunks = minimal_chunks(seen["teacher"].tokens, seen["student"].tokens)
    case: dict[str, Any] = {"note": "", "chunks_checked": chunks, "chunks_unchecked": chunks}
    for side, encoding in seen.items():
        case |= {f"text_{side}": text, f"kind_{side}": "GPT2"}
        case |= {f"ids_{side}": encoding.ids, f"tokens_{side}": encoding.tokens}
    return case


def write_cross(folder: Path, tools: dict[str, Any], rows: list[list[dict[str, str]]]) -> None:
    """Write map_cross.json and collate_cross.npz; the teacher's limit cuts one chat inside a chunk."""
    mapped, samples = [], []
    for row in rows:
        student, teacher = Seen(tools["student"], STUDENT, row), Seen(tools["teacher"], TEACHER, row)
        told: dict[str, Any] = {"prompt_len": student.prompt, "_discard": student.prompt >= MAX_LENGTH}
        names = ("input_ids", "labels", "teacher_input_ids", "teacher_labels", "ranges")
        mapped.append(told | {name: [] for name in names})
        if told["_discard"]:
            continue
        places = []
        for message in row:
            spans = [seen.find(message["content"]) for seen in (teacher, student)]
            if all(spans) and same_text(tools, (teacher, student), spans):
                places.append([*spans[0], *spans[1]])
        ids, labels = student.ids[:MAX_LENGTH], student.labels[:MAX_LENGTH]
        values = (ids, labels, teacher.ids, teacher.labels, places)
        mapped[-1] |= dict(zip(names, values, strict=True))
        chunks = []
        for t0, t1, s0, s1 in places:
            end = min(s1, len(ids))
            found = minimal_chunks(teacher.tokens[t0:t1], student.tokens[s0:end]) if s0 < end else []
            chunks += [[t0 + a, t0 + b, s0 + c, s0 + d] for a, b, c, d in found]
        end = min(chunks[-1][1] if chunks else len(teacher.ids), TEACHER_LIMIT)
        samples.append((ids, labels, teacher.ids[:end], teacher.labels[:end], chunks))
    write(
        folder / "map_cross.json",
        {"rows": [{"messages": row} for row in rows], "max_length": MAX_LENGTH, "mapped": mapped},
    )
    eos, pad, other = 5, 1, 0  # of the two vocabularies
    filled = [fill(ids, labels, eos) for ids, labels, *_ in samples]
    arrays = {}
    for padding in ("dyn", "fixed"):
        width = MAX_LENGTH if padding == "fixed" else max(len(ids) for ids, _ in filled)
        batch = {
            "input_ids": [padded(ids, width, pad) for ids, _ in filled],
            "labels": [padded(labels, width, -100) for _, labels in filled],
            "attention_mask": [
                padded([1] * (width if padding == "fixed" else len(ids)), width, 0) for ids, _ in filled
            ],
            **teacher_side([(ids, labels) for _, _, ids, labels, _ in samples], other),
        }
        long = len(batch["teacher_input_ids"][0])
        columns = max(len(chunks) for *_, chunks in samples)
        matrices = [np.zeros((len(samples), size, columns), dtype=bool) for size in (long, width)]
        for sample, (*_, chunks) in enumerate(samples):
            for column, (t0, t1, s0, s1) in enumerate(chunks):
                matrices[0][sample, t0:t1, column] = matrices[1][sample, s0:s1, column] = True
        batch |= {"alignment_matrix_teacher": matrices[0], "alignment_matrix_student": matrices[1]}
        arrays |= {f"GPT2_GPT2_{padding}_{field}": np.asarray(value) for field, value in batch.items()}
    np.savez(folder / "collate_cross.npz", **arrays)


def same_text(tools: dict[str, Any], sides: tuple[Seen, Seen], spans: list[Any]) -> bool:
    """Compare what both ranges decode to."""
    texts = [
        tools[name].decode(seen.ids[slice(*span)], skip_special_tokens=False).strip()
        for name, seen, span in zip(("teacher", "student"), sides, spans, strict=True)
    ]
    return texts[0] == texts[1]


def write_shared(folder: Path, tools: dict[str, Any], rows: list[list[dict[str, str]]]) -> None:
    """Write map_shared.json and collate_shared.npz."""
    mapped, samples = [], []
    for row in rows:
        sides = [Seen(tools["student"], template, row) for template in (LONGER, STUDENT)]
        teacher, student = sides
        told: dict[str, Any] = {"prompt_len": student.prompt, "_discard": student.prompt >= MAX_LENGTH}
        names = ("input_ids", "labels", "teacher_input_ids", "align_teacher", "align_student")
        mapped.append(told | {name: [] for name in names})
        if told["_discard"]:
            continue
        pairs, behind = [], [0, 0]
        for message in row[1::2]:
            content = message["content"]
            starts = [seen.text.find(content, at) for seen, at in zip(sides, behind, strict=True)]
            behind = [start + len(content) for start in starts]
            inside = [
                [n for n, (a, b) in enumerate(seen.offsets) if start <= a < b <= end]
                for seen, start, end in zip(sides, starts, behind, strict=True)
            ]
            pairs += [[t, s] for t, s in zip(*inside, strict=False) if s < MAX_LENGTH]
        end = max((t + 1 for t, _ in pairs), default=len(teacher.ids))
        ids, labels = student.ids[:MAX_LENGTH], student.labels[:MAX_LENGTH]
        values = (ids, labels, teacher.ids[:end], [t for t, _ in pairs], [s for _, s in pairs])
        mapped[-1] |= dict(zip(names, values, strict=True))
        samples.append((ids, labels, teacher.ids[:end], pairs))
    whole: dict[str, Any] = {"rows": [{"messages": row} for row in rows], "max_length": MAX_LENGTH}
    whole |= {"student_template": STUDENT, "teacher_template": LONGER, "mapped": mapped}
    write(folder / "map_shared.json", whole)
    eos, pad = 5, 1
    filled = [fill(ids, labels, eos) for ids, labels, *_ in samples]
    arrays = {}
    for limit in (25, 90):
        kept = [[pair for pair in pairs if pair[0] < limit] for *_, pairs in samples]
        slots = max(1, *map(len, kept))
        batch = {
            "input_ids": [padded(ids, MAX_LENGTH, pad) for ids, _ in filled],
            "labels": [padded(labels, MAX_LENGTH, -100) for _, labels in filled],
            "attention_mask": [[1] * MAX_LENGTH for _ in filled],
            **teacher_side([fill(ids[:limit], ids[:limit], eos) for _, _, ids, _ in samples], pad),
            "n_aligned": [len(pairs) for pairs in kept],
        }
        del batch["teacher_labels"]
        for place, side in enumerate(("teacher", "student")):
            batch[f"align_{side}"] = [padded([pair[place] for pair in pairs], slots, 0) for pairs in kept]
        arrays |= {f"tml{limit}_{field}": np.asarray(value) for field, value in batch.items()}
    np.savez(folder / "collate_shared.npz", **arrays)


def teacher_side(samples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, list[list[int]]]:
    """Pad the teacher's ids and labels to the longest."""
    width = max(len(ids) for ids, _ in samples)
    return {
        "teacher_input_ids": [padded(ids, width, pad) for ids, _ in samples],
        "teacher_labels": [padded(labels, width, -100) for _, labels in samples],
        "teacher_attention_mask": [padded([1] * len(ids), width, 0) for ids, _ in samples],
    }


def fill(ids: list[int], labels: list[int], eos: int) -> tuple[list[int], list[int]]:
    """Fill the last block."""
    more = [eos] * (-len(ids) % BLOCK)
    return ids + more, labels + more


def padded(values: list[int], length: int, value: int) -> list[int]:
    """Pad on the right."""
    return values + [value] * (length - len(values))


def write(path: Path, content: Any) -> None:
    """Store as JSON."""
    path.write_text(json.dumps(content), encoding="utf-8")
