"""The replay tool: everything in the goldens agrees, and whatever is spoilt in them is noticed."""

from __future__ import annotations

import collections
import json
import re
import shutil
import sys

import numpy as np
import pytest

from goldens.batches import LAST_CHUNK
from goldens.chunks import REPLACED
from goldens.row import Golden
from goldens.texts import FIRST, LAST_PAIR
from replay_goldens import DATA, REPLAYS, main, replay

STEP_OUTPUTS = ".*_(loss|log_.*|student_grad|student_input_ids|teacher._input_ids)|.*_mask.*_(xt|x0)"
OUTPUTS = {
    "alpha.npz": "(linear|cosine)_.*",
    "bd3lm_mask.npz": "n.*",
    "sampler.npz": "ntt_.*|step_out",
    "taid.npz": ".*_loss|.*_grad",
    "alm.npz": ".*_loss|.*_grad",
    "step_bd3lm.npz": ".*_loss|.*_grad|student_input_ids",
    "step_shared.npz": f"{STEP_OUTPUTS}|student_attention_mask",
    "step_cross.npz": f"{STEP_OUTPUTS}|(student|teacher)_attention_mask|student_position_ids",
    "step_aligned.npz": STEP_OUTPUTS,
}
"""What the replays of formulas and steps compare, by file."""
DIFFERING = {
    ("tokenkit_align.json", REPLACED): 10,
    ("map_cross.json", FIRST): 1,
    ("map_shared.json", FIRST): 1,
    ("map_shared.json", LAST_PAIR): 2,
    ("find_text.json", FIRST): 3,
    ("collate_cross.npz", FIRST): 4,
    ("collate_cross.npz", LAST_CHUNK): 8,
    ("collate_shared.npz", FIRST): 2,
    ("collate_shared.npz", LAST_PAIR): 3,
}
"""How many rows differ, by file and by the reference bug that explains them."""


def failures(path):
    """Replay one file and return its failing rows."""
    return [row for row in REPLAYS[path.name](path) if not row.passed]


def rewrite(path, **arrays):
    """Store a file again with some arrays changed, or added."""
    np.savez(path, **{**dict(np.load(path)), **arrays})


def rewrite_cases(path, change):
    """Store a file again after `change(cases)`."""
    cases = json.loads(str(np.load(path)["cases_json"]))
    change(cases)
    rewrite(path, cases_json=np.array(json.dumps(cases)))


@pytest.fixture
def copy(goldens, tmp_path):
    """Copy a file of the goldens, to be spoilt."""
    return lambda name: shutil.copy(goldens / name, tmp_path / name)


def test_the_whole_folder_is_replayed(goldens, monkeypatch, capsys):
    """One run of the command as a user gives it; models included."""
    monkeypatch.setattr(sys, "argv", ["replay_goldens.py", *([] if goldens == DATA else [str(goldens)])])
    rows = []
    monkeypatch.setattr("replay_goldens.replay", lambda folder: rows.extend(replay(folder)) or rows)
    assert main() == 0
    assert "0 failed" in capsys.readouterr().out.splitlines()[-1]
    of_status = collections.defaultdict(list)
    for row in rows:
        of_status[row.status].append(row)
    assert len(of_status["replayed"]) >= 330
    assert collections.Counter((row.file, row.note) for row in of_status["differs"]) == DIFFERING
    assert {row.file for row in of_status["not there"]} <= {"teacher_llada2_moe_g4"}
    notes = {row.label: row.note for row in rows if row.file == "tokenkit_align.json"}
    for kinds in ("GPT2, GPT2", "Qwen2, Qwen3"):
        assert notes[kinds] == "24 of 24 cases equal"


def test_the_folder_of_a_clone_stays_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 6 * 2**20


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_spoilt_number_is_noticed(copy, name):
    """Change one element of a few compared arrays, one array at a time, by little."""
    path = copy(name)
    arrays = dict(np.load(path))
    compared = [key for key in arrays if re.fullmatch(OUTPUTS[name], key)]
    generator = np.random.default_rng(0)
    for key in generator.choice(compared, size=min(6, len(compared)), replace=False):
        spoilt = np.array(arrays[key])
        place = tuple(generator.integers(size) for size in spoilt.shape)
        if spoilt.dtype == bool:
            spoilt[place] = not spoilt[place]
        elif "attention_mask" in key:
            spoilt[place] = -1.0 - spoilt[place]
        else:
            spoilt[place] += 1 if spoilt.dtype.kind == "i" else max(1e-4, abs(spoilt[place]) * 1e-3)
        np.savez(path, **{**arrays, key: spoilt})
        assert failures(path), key


@pytest.mark.parametrize("key", ["cfg_seq", "shift_hist", "spb3_seq", "prep_attn", "prep_pos"])
def test_a_spoilt_batch_of_the_sampler_is_noticed(copy, goldens, key):
    path = copy("sampler.npz")
    (path.parent / "student_a2d_qwen3").symlink_to(goldens / "student_a2d_qwen3")
    spoilt = np.load(path)[key]
    spoilt[..., -1] = ~spoilt[..., -1] if spoilt.dtype == bool else spoilt[..., -1] + 1
    rewrite(path, **{key: spoilt})
    assert {row.note.partition(":")[0] for row in failures(path)} == {key}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_unknown_key_fails(copy, name):
    path = copy(name)
    rewrite(path, surprise=np.zeros(3))
    (row,) = failures(path)
    assert row.label == "surprise"
    assert "unknown key" in row.note


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name == "taid.npz" or "step" in name])
def test_an_unknown_option_of_a_case_fails(copy, name):
    path = copy(name)
    rewrite_cases(path, lambda cases: cases[0].update(antithetic=True))
    (row,) = failures(path)
    assert row.label == "cases_json: antithetic"
    assert "unknown option" in row.note


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("taid.npz", "case3_grad"),
        ("step_shared.npz", "kl_std_xt_x0_loss"),
        ("step_cross.npz", "alm_taid_std_token_log_lambda_train"),
        ("step_aligned.npz", "kl_aligned_demo_xt_x0_teacher1_input_ids"),
    ],
)
def test_a_missing_key_fails(copy, name, key):
    path = copy(name)
    arrays = dict(np.load(path))
    del arrays[key]
    np.savez(path, **arrays)
    failed = [row for row in replay(path.parent) if not row.passed]
    assert [(row.file, key in row.note) for row in failed] == [(name, True)]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("step_bd3lm.npz", "linear_scheduler_token_noshift"),
        ("step_shared.npz", "kl_std_xt_x0"),
        ("step_cross.npz", "alm_demo_token"),
        ("step_aligned.npz", "kl_aligned_std_xt_x0"),
    ],
)
def test_uniforms_of_another_seed_fail(copy, name, key):
    path = copy(name)
    arrays, generator = np.load(path), np.random.default_rng(7)
    draws = [f"{key}_u0", f"{key}_u1"]
    rewrite(path, **{draw: generator.random(arrays[draw].shape, dtype=np.float32) for draw in draws})
    assert {re.split("[:,]", row.label)[0] for row in failures(path)} == {key}


@pytest.mark.parametrize(
    ("key", "value"),
    [("kl_temperature", 2.5), ("shared_vocab_size", 15), ("global_step", 38), ("kl_weight", 0.31)],
)
def test_options_come_from_the_file(copy, key, value):
    """A case with another option no longer has the recorded loss: the option was read, not assumed."""
    path, tags = copy("step_shared.npz"), []

    def change(cases):
        chosen = next(case for case in cases if case["mode"] == "taid+kl" and not case["demo"])
        chosen[key] = value
        tags.append(chosen["tag"])

    rewrite_cases(path, change)
    assert [row.label for row in failures(path)] == tags


def test_a_chunk_with_a_gap_is_refused(copy):
    path = copy("step_cross.npz")
    student = np.load(path)["in_alignment_matrix_student"]
    sample, column = np.argwhere(student.sum(axis=1) > 1)[0]
    last = student[sample, :, column].nonzero()[0][-1]
    student[sample, last, column], student[sample, (last + 1) % student.shape[1], column] = False, True
    rewrite(path, in_alignment_matrix_student=student)
    with pytest.raises(ValueError, match="gap"):
        REPLAYS[path.name](path)


def test_what_is_not_there_is_said_and_the_rest_is_replayed(copy, goldens, tmp_path):
    """A folder without text files, with a model whose weights are missing, and with a stranger."""
    for name in ("alpha.npz", "alm.npz", "find_text.json", "tokenkit_align.json"):
        copy(name)
    (tmp_path / "teacher_dream").mkdir()
    for name in ("config.json", "shapes.json", "io.npz"):
        shutil.copy(goldens / "teacher_dream" / name, tmp_path / "teacher_dream" / name)
    rows = replay(tmp_path)
    assert {row.file for row in rows if row.status == "replayed"} == {"alpha.npz", "alm.npz"}
    notes = {row.file: row.note for row in rows if row.status == "not there"}
    assert set(notes) == set(REPLAYS) - {"alpha.npz", "alm.npz"}
    assert notes["step_cross.npz"] == "this folder has no step_cross.npz"
    assert notes["find_text.json"] == "this folder has no map_cross.json"
    assert notes["tokenkit_align.json"] == "this folder has no tokenizers/info.json"
    assert notes["teacher_dream"] == "this folder has no teacher_dream/model.safetensors"
    assert not [row for row in rows if not row.passed]
    (tmp_path / "alpha.npz").write_bytes(b"cut short")
    (tmp_path / "teacher_novel").mkdir()
    failed = {row.file: row.note for row in replay(tmp_path) if not row.passed}
    assert set(failed) == {"alpha.npz", "teacher_novel"}
    assert failed["teacher_novel"] == "unknown file: nothing replays it"


def test_the_exit_code_says_it(copy, tmp_path, monkeypatch, capsys):
    """An empty folder replays nothing. No folder at all is a usage error."""
    monkeypatch.setattr(sys, "argv", ["replay_goldens.py", str(tmp_path)])
    assert main() == 1
    assert f"{len(REPLAYS)} not there, 0 failed" in capsys.readouterr().out
    copy("alpha.npz")
    assert main() == 0
    (tmp_path / "novelty.npz").touch()
    assert main() == 1
    monkeypatch.setattr(sys, "argv", ["replay_goldens.py", str(tmp_path / "no")])
    assert main() == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_reader_reports_what_nobody_touched(tmp_path):
    np.savez(tmp_path / "x.npz", seen=np.zeros(2), lost=np.zeros(2), waiting=np.zeros(2))
    golden = Golden(tmp_path / "x.npz")
    golden.compare("seen", {"seen": golden.read("seen") + 1e-7})
    golden.compare("none", {})
    golden.leave_out("waiting", ["waiting"], "its model")
    statuses = {row.label: row.status for row in golden.rows()}
    assert statuses == {"seen": "replayed", "none": "failed", "waiting": "not there", "lost": "failed"}
