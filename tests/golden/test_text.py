"""Replays of recorded texts and chats: what is excused is excused by name and place, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from goldens import chats, texts
from replay_goldens import REPLAYS

TEXTS = ["tokenkit_align.json", "map_cross.json", "map_shared.json", "find_text.json"]
BATCHES = ["collate_cross.npz", "collate_shared.npz"]


@pytest.fixture
def folder(goldens, tmp_path):
    """Copy the files of texts and chats."""
    for name in TEXTS + BATCHES:
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


@pytest.mark.parametrize("number", [0, 76])  # case 76 differs by bug 3
@pytest.mark.parametrize("column", ["chunks_checked", "chunks_unchecked", "ids_student", "tokens_teacher"])
def test_a_spoilt_alignment_fails_excused_or_not(folder, column, number):
    path = folder / "tokenkit_align.json"

    def change(whole):
        value = whole["cases"][number][column]
        spoil = {int: lambda v: v + 1, str: lambda v: v + "x", list: lambda v: [v[0], v[1] + 1, *v[2:]]}
        value[0] = spoil[type(value[0])](value[0])

    rewrite(path, change)
    assert [label.split(" ")[1] for label in failed(path)] == [str(number)]


def test_replaced_tokens_excuse_no_other_case(folder):
    """Chunks as bug 3 would give them, recorded for kinds that know the same pieces."""
    path = folder / "tokenkit_align.json"

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
def test_a_spoilt_chat_fails(folder, name, row, key, label):
    def change(whole):
        told = whole["mapped"][row]
        if isinstance(told[key], list):
            last = told[key][-1]
            told[key][-1] = [*last[:3], last[3] + 1] if isinstance(last, list) else last + 1
        else:
            told[key] = not told[key] if key == "_discard" else told[key] + 1

    rewrite(folder / name, change)
    found = failed(folder / name)
    assert label in found
    assert {other.split(":")[0] for other in found} == {f"row {row}"}


def test_a_missing_range_fails_where_the_search_finds_the_right_place(folder):
    rewrite(folder / "map_cross.json", lambda whole: whole["mapped"][0]["ranges"].pop())
    assert failed(folder / "map_cross.json") == ["row 0: ranges"]


@pytest.mark.parametrize("number", [0, 6])
def test_a_spoilt_search_fails(folder, number):
    """Case 0 is found where it is, case 6 elsewhere."""
    rewrite(folder / "find_text.json", lambda whole: whole[number]["range"].__setitem__(1, 3))
    assert [label.split(":")[0] for label in failed(folder / "find_text.json")] == [f"case {number}"]


def test_spoilt_tokenizers_fail(folder):
    def change(info):
        info["student_chat_template"] = info["student_chat_template"].replace("im_start", "im_begin")

    rewrite(folder / "tokenizers" / "info.json", change)
    (folder / "tokenizers" / "third.json").write_text("{}")
    rows = [row for row in REPLAYS["tokenizers"](folder / "tokenizers") if not row.passed]
    assert {row.file for row in rows} == {"tokenizers/info.json", "tokenizers/third.json"}
    # Chats under that template have other ids; map_shared.json brings templates of its own.
    assert failed(folder / "map_cross.json")
    assert failed(folder / "collate_cross.npz")
    assert not failed(folder / "map_shared.json")


@pytest.mark.parametrize("name", TEXTS)
def test_unknown_keys_of_chats_fail(folder, name):
    def change(whole):
        cases = whole if isinstance(whole, list) else whole.get("mapped", whole.get("cases"))
        cases[0]["novel"] = 1

    rewrite(folder / name, change)
    try:
        assert failed(folder / name)
    except ValueError as error:
        assert "unknown" in str(error)  # noqa: PT017 - the tool makes a failing row of it


@pytest.mark.parametrize("name", BATCHES)
def test_every_array_of_a_batch_is_compared(folder, name):
    """Spoil one element of every array, one at a time, where it is used and where it is padding."""
    path = folder / name
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
def test_an_unknown_array_of_a_batch_fails(folder, name):
    np.savez(folder / name, **dict(np.load(folder / name)), surprise=np.zeros(2))
    assert failed(folder / name) == ["surprise"]


def test_faults_of_our_own_alignment_are_not_excused(goldens, monkeypatch):
    """Chunks that are not minimal, in every place where the replays ask for ours."""
    for module in (texts, chats):
        align = module.align_chats

        def merged(student, teacher, messages=None, align=align):
            first, second, *rest = [*align(student, teacher, messages), None, None]
            if second is None:
                return [chunk for chunk in (first,) if chunk]
            joined = first._replace(student_end=second.student_end, teacher_end=second.teacher_end)
            return [joined, *(chunk for chunk in rest if chunk)]

        monkeypatch.setattr(module, "align_chats", merged)
    for name in ("tokenkit_align.json", "map_shared.json", *BATCHES):
        assert failed(goldens / name), name


def test_contents_in_a_wrong_place_are_not_excused(goldens, monkeypatch):
    """The search of the reference would then seem to find every content elsewhere."""
    encode = chats.encode_chat

    def shifted(tokenizer, messages, **options):
        encoded = encode(tokenizer, messages, **options)
        moved = [c._replace(start=c.start - 2, end=c.end - 2) for c in encoded.contents]
        return dataclasses.replace(encoded, contents=moved)

    monkeypatch.setattr(chats, "encode_chat", shifted)
    rows = [row for row in REPLAYS["map_cross.json"](goldens / "map_cross.json") if "ranges" in row.label]
    assert sum(not row.passed for row in rows) == len(rows) - 1  # one chat is left out
    assert failed(goldens / "find_text.json")


def test_an_equal_text_earlier_excuses_only_the_tokens_that_show_it(folder):
    """Case 6 of find_text.json is found in the first of two equal messages."""
    path = folder / "find_text.json"
    start, end = json.loads(path.read_text(encoding="utf-8"))[6]["range"]
    for wrong in ([start - 1, end], [start, end + 1], [start + 1, end], [0, 2]):
        rewrite(path, lambda whole, wrong=wrong: whole[6].update(range=wrong))
        assert [label.split(":")[0] for label in failed(path)] == ["case 6"], wrong
