"""Replays of recorded texts and chats: what is excused is excused by name and place, and nothing else is."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil

import numpy as np
import pytest

from goldens import alignment, chats, conversation
from goldens.alignment import REPLACED
from goldens.collated import CUT, CUT_PAIR, LAST_CHUNK
from goldens.conversation import EDGE, FIRST, SPLIT
from goldens.mapped import LAST_PAIR
from replay_goldens import REPLAYS
from tests.golden.other_chats import write_other_chats

CHATS = ["tokenkit_align.json", "map_cross.json", "map_shared.json", "find_text.json"]
BATCHES = ["collate_cross.npz", "collate_shared.npz"]
EXCUSED = {
    "tokenkit_align.json": {REPLACED: 10},
    "map_cross.json": {FIRST: 1},
    "map_shared.json": {FIRST: 1, LAST_PAIR: 2},
    "find_text.json": {FIRST: 3},
    "collate_cross.npz": {FIRST: 4, LAST_CHUNK: 8},
    "collate_shared.npz": {FIRST: 2, LAST_PAIR: 3},
}
"""How many rows differ by which bug in the recorded folder."""


@pytest.fixture
def texts(goldens, tmp_path):
    """Copy the files of texts and chats."""
    for name in CHATS + BATCHES:
        shutil.copy(goldens / name, tmp_path / name)
    shutil.copytree(goldens / "tokenizers", tmp_path / "tokenizers")
    return tmp_path


def failed(path):
    """Replay a file; return the labels of its failing rows."""
    return [row.label for row in REPLAYS[path.name](path) if not row.passed]


def rewrite(path, change):
    """Change the content of a JSON file in place."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    change(whole)
    path.write_text(json.dumps(whole), encoding="utf-8")


@pytest.mark.parametrize("name", CHATS + BATCHES)
def test_every_difference_has_the_name_of_a_bug(goldens, name):
    rows = REPLAYS[name](goldens / name)
    assert {row.status for row in rows} == {"replayed", "differs"}
    assert collections.Counter(row.note for row in rows if row.status == "differs") == EXCUSED[name]


def test_pure_kinds_follow_the_byte_rule_everywhere(goldens):
    rows = {row.label: row for row in REPLAYS["tokenkit_align.json"](goldens / "tokenkit_align.json")}
    for kinds in ("GPT2, GPT2", "Qwen2, Qwen3"):
        assert rows[kinds].note == "24 of 24 cases equal"
    assert {rows[kinds].note for kinds in ("GPT2, Qwen3", "Qwen3, GPT2")} == {"19 of 24 cases equal"}


@pytest.mark.parametrize("excused", [False, True])
@pytest.mark.parametrize("column", ["chunks_checked", "chunks_unchecked", "ids_student", "tokens_teacher"])
def test_a_spoilt_alignment_fails_excused_or_not(texts, column, excused):
    path = texts / "tokenkit_align.json"
    number = 76 if excused else 0  # case 76 differs by bug 3

    def change(whole):
        value = whole["cases"][number][column]
        value[0] = {int: lambda v: v + 1, str: lambda v: v + "x", list: lambda v: [v[0], v[1] + 1, *v[2:]]}[
            type(value[0])
        ](value[0])

    assert not failed(path)
    rewrite(path, change)
    assert [label.split(" ")[1] for label in failed(path)] == [str(number)]


def test_replaced_tokens_excuse_no_other_case(texts):
    """Chunks as bug 3 would give them, recorded for kinds that know the same pieces."""
    path = texts / "tokenkit_align.json"

    def change(whole):
        spoilt = next(case for case in whole["cases"] if case["text_student"] == "\n")
        assert (spoilt["kind_teacher"], spoilt["kind_student"]) == ("GPT2", "GPT2")
        spoilt["chunks_checked"] = spoilt["chunks_unchecked"] = []

    rewrite(path, change)
    assert len(failed(path)) == 1


@pytest.mark.parametrize(
    ("name", "row", "key", "label"),
    [
        ("map_cross.json", 0, "ranges", "row 0: ranges"),
        ("map_cross.json", 2, "ranges", "row 2: ranges"),
        ("map_cross.json", 1, "labels", "row 1: ids"),
        ("map_cross.json", 1, "teacher_labels", "row 1: ids"),
        ("map_cross.json", 3, "prompt_len", "row 3: ids"),
        ("map_cross.json", 3, "_discard", "row 3: ids"),
        ("map_shared.json", 0, "align_teacher", "row 0: pairs"),
        ("map_shared.json", 2, "align_student", "row 2: pairs"),
        ("map_shared.json", 2, "teacher_input_ids", "row 2: teacher ids"),
        ("map_shared.json", 1, "input_ids", "row 1: ids"),
    ],
)
def test_a_spoilt_chat_fails(texts, name, row, key, label):
    def change(whole):
        told = whole["mapped"][row]
        if isinstance(told[key], list):
            last = told[key][-1]
            told[key][-1] = [*last[:3], last[3] + 1] if isinstance(last, list) else last + 1
        else:
            told[key] = not told[key] if key == "_discard" else told[key] + 1

    rewrite(texts / name, change)
    assert failed(texts / name) == [label]


def test_a_missing_range_fails_where_the_search_finds_the_right_place(texts):
    rewrite(texts / "map_cross.json", lambda whole: whole["mapped"][0]["ranges"].pop())
    assert failed(texts / "map_cross.json") == ["row 0: ranges"]


@pytest.mark.parametrize("number", [0, 6])
def test_a_spoilt_search_fails(texts, number):
    """Case 0 is found where it is, case 6 elsewhere."""
    rewrite(texts / "find_text.json", lambda whole: whole[number]["range"].__setitem__(1, 3))
    assert [label.split(":")[0] for label in failed(texts / "find_text.json")] == [f"case {number}"]


@pytest.mark.parametrize("name", CHATS)
def test_unknown_keys_of_chats_fail(texts, name):
    def change(whole):
        cases = whole if isinstance(whole, list) else whole.get("mapped", whole.get("cases"))
        cases[0]["novel"] = 1

    rewrite(texts / name, change)
    try:
        assert failed(texts / name)
    except ValueError as error:
        assert "unknown" in str(error)  # noqa: PT017 - the tool makes a failing row of it


@pytest.mark.parametrize("name", BATCHES)
def test_every_array_of_a_batch_is_compared(texts, name):
    """Spoil one element of every array, one at a time, where it is used and where it is padding."""
    path = texts / name
    arrays = dict(np.load(path))
    chosen = [key for key in arrays if key.startswith(("GPT2_GPT2_dyn", "Qwen2_Qwen3_fixed", "tml40"))]
    assert len(chosen) in (8, 16)
    for key in chosen:
        for place in ((0,) * arrays[key].ndim, (-1,) * arrays[key].ndim):
            spoilt = np.array(arrays[key])
            spoilt[place] = not spoilt[place] if spoilt.dtype == bool else spoilt[place] + 1
            np.savez(path, **{**arrays, key: spoilt})
            try:
                assert failed(path), (key, place)
            except (ValueError, RuntimeError, IndexError):
                continue  # the tool makes a failing row of it


@pytest.mark.parametrize("name", BATCHES)
def test_an_unknown_array_of_a_batch_fails(texts, name):
    np.savez(texts / name, **dict(np.load(texts / name)), surprise=np.zeros(2))
    assert failed(texts / name) == ["surprise"]


@pytest.fixture
def other(goldens, tmp_path):
    """Write a folder of other chats, worked out the reference's way with the tokenizers library alone."""
    write_other_chats(goldens, tmp_path)
    return tmp_path


def test_other_chats_are_replayed_or_excused_by_name(other):
    rows = [row for name in ["tokenizers", *CHATS, *BATCHES] for row in REPLAYS[name](other / name)]
    assert not [row for row in rows if not row.passed]
    names = {name for row in rows if row.status == "differs" for name in row.note.split("; ")}
    # The names of cuts have a semicolon of their own.
    expected = {
        part for bug in (FIRST, SPLIT, EDGE, CUT, LAST_CHUNK, LAST_PAIR, CUT_PAIR) for part in bug.split("; ")
    }
    assert names == expected
    assert sum(row.status == "replayed" for row in rows) > 40


@pytest.mark.parametrize("name", BATCHES)
def test_a_spoilt_batch_of_other_chats_fails(other, name):
    path = other / name
    arrays = dict(np.load(path))
    generator = np.random.default_rng(3)
    for key in generator.choice(list(arrays), 6, replace=False):
        spoilt = np.array(arrays[key])
        place = tuple(generator.integers(size) for size in spoilt.shape)
        spoilt[place] = not spoilt[place] if spoilt.dtype == bool else spoilt[place] + 1
        np.savez(path, **{**arrays, key: spoilt})
        try:
            assert failed(path), (key, place)
        except (ValueError, RuntimeError, IndexError):
            continue  # the tool makes a failing row of it


def test_faults_of_our_own_alignment_are_not_excused(goldens, other, monkeypatch):
    """Chunks that are not minimal, in every place where the replays ask for ours."""
    for module in (alignment, chats):
        align = module.align_chats

        def merged(student, teacher, messages=None, align=align):
            first, second, *rest = [*align(student, teacher, messages), None, None]
            if second is None:
                return [chunk for chunk in (first,) if chunk]
            joined = first._replace(student_end=second.student_end, teacher_end=second.teacher_end)
            return [joined, *(chunk for chunk in rest if chunk)]

        monkeypatch.setattr(module, "align_chats", merged)
    for folder in (goldens, other):
        for name in ("tokenkit_align.json", "map_shared.json", *BATCHES):
            assert failed(folder / name), name


def test_contents_in_a_wrong_place_are_not_excused(goldens, other, monkeypatch):
    """The search of the reference would then seem to find every content elsewhere."""
    encode = conversation.encode_chat

    def shifted(tokenizer, messages, **options):
        encoded = encode(tokenizer, messages, **options)
        moved = [dataclasses.replace(c, start=c.start - 2, end=c.end - 2) for c in encoded.contents]
        return dataclasses.replace(encoded, contents=moved)

    monkeypatch.setattr(conversation, "encode_chat", shifted)
    for folder in (goldens, other):
        chats_kept = [
            row for row in REPLAYS["map_cross.json"](folder / "map_cross.json") if "ranges" in row.label
        ]
        assert sum(not row.passed for row in chats_kept) == len(chats_kept) - 1  # one chat is left out
        assert failed(folder / "find_text.json")
