"""The replay tool: everything in the goldens agrees, and whatever is spoilt in them is noticed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from goldens.row import Golden
from replay_goldens import REPLAYS, main, replay
from tests.golden.other_folder import write_other_folder

TOOL = Path(__file__).parents[2] / "tools" / "replay_goldens.py"
FORMULAS = [
    "alpha.npz",
    "bd3lm_mask.npz",
    "sampler.npz",
    "taid.npz",
    "alm.npz",
    "step_bd3lm.npz",
    "step_shared.npz",
    "step_cross.npz",
    "step_aligned.npz",
]
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
"""What the replays compare, by file."""


def arrays_of(path):
    """Read an npz file into memory."""
    return dict(np.load(path))


def failures(path):
    """Replay one file and return its failing rows."""
    return [row for row in REPLAYS[path.name](path) if not row.passed]


def test_the_real_folder_is_replayed_whole(goldens):
    """One run of the command as a user gives it; models included."""
    done = subprocess.run(
        [sys.executable, str(TOOL), str(goldens)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"(\d+) replayed, (\d+) differs, (\d+) later issue, 0 failed", done.stdout)
    assert counts, done.stdout
    assert int(counts[1]) >= 100
    assert int(counts[3]) == 1, "only the sampler's sequences wait"
    for name in FORMULAS:
        assert name in done.stdout


@pytest.mark.parametrize("name", FORMULAS)
def test_only_what_the_issue_allows_waits(goldens, name):
    rows = REPLAYS[name](goldens / name)
    assert not [row for row in rows if row.status in ("failed", "differs")]
    waiting = [row.label for row in rows if row.status == "later issue"]
    assert waiting == (["whole sequences"] if name == "sampler.npz" else [])


def spoil(source, copy):
    """Change one element of six compared arrays, one array at a time, by little; each must be noticed."""
    arrays = arrays_of(source)
    compared = [key for key in arrays if re.fullmatch(OUTPUTS[source.name], key)]
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
        np.savez(copy, **{**arrays, key: spoilt})
        assert failures(copy), key


@pytest.mark.parametrize("name", FORMULAS)
def test_a_spoilt_number_is_noticed(goldens, tmp_path, name):
    spoil(goldens / name, tmp_path / name)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_unknown_key_fails(goldens, tmp_path, name):
    np.savez(tmp_path / name, **arrays_of(goldens / name), surprise=np.zeros(3))
    (row,) = failures(tmp_path / name)
    assert row.label == "surprise"
    assert "unknown key" in row.note


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("taid.npz", "case3_grad"),
        ("step_shared.npz", "kl_std_xt_x0_loss"),
        ("step_cross.npz", "alm_taid_std_token_log_lambda_train"),
        ("step_aligned.npz", "kl_aligned_demo_xt_x0_teacher1_input_ids"),
    ],
)
def test_a_missing_key_fails(goldens, tmp_path, name, key):
    arrays = arrays_of(goldens / name)
    del arrays[key]
    np.savez(tmp_path / name, **arrays)
    with pytest.raises(KeyError, match=key):
        REPLAYS[name](tmp_path / name)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("step_bd3lm.npz", "linear_scheduler_token_noshift"),
        ("step_shared.npz", "kl_std_xt_x0"),
        ("step_cross.npz", "alm_demo_token"),
        ("step_aligned.npz", "kl_aligned_std_xt_x0"),
    ],
)
def test_uniforms_of_another_seed_fail(goldens, tmp_path, name, key):
    arrays = arrays_of(goldens / name)
    generator = np.random.default_rng(7)
    for draws in ("u0", "u1"):
        shape = arrays[f"{key}_{draws}"].shape
        arrays[f"{key}_{draws}"] = generator.random(shape, dtype=np.float32)
    np.savez(tmp_path / name, **arrays)
    assert {re.split("[:,]", row.label)[0] for row in failures(tmp_path / name)} == {key}


@pytest.mark.parametrize("name", [name for name in FORMULAS if name == "taid.npz" or "step" in name])
def test_an_unknown_option_of_a_case_fails(goldens, tmp_path, name):
    arrays = arrays_of(goldens / name)
    cases = json.loads(str(arrays["cases_json"]))
    cases[0]["antithetic"] = True
    np.savez(tmp_path / name, **{**arrays, "cases_json": np.array(json.dumps(cases))})
    with pytest.raises((AssertionError, ValueError), match="antithetic"):
        REPLAYS[name](tmp_path / name)


@pytest.mark.parametrize(
    ("key", "value"),
    [("kl_temperature", 2.5), ("shared_vocab_size", 15), ("global_step", 38), ("kl_weight", 0.31)],
)
def test_options_come_from_the_file(goldens, tmp_path, key, value):
    """A case with another option no longer has the recorded loss: the option was read, not assumed."""
    arrays = arrays_of(goldens / "step_shared.npz")
    cases = json.loads(str(arrays["cases_json"]))
    chosen = next(case for case in cases if case["mode"] == "taid+kl" and not case["demo"])
    chosen[key] = value
    np.savez(tmp_path / "step_shared.npz", **{**arrays, "cases_json": np.array(json.dumps(cases))})
    assert [row.label for row in failures(tmp_path / "step_shared.npz")] == [chosen["tag"]]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Return a folder of other shapes and seeds."""
    folder = tmp_path_factory.mktemp("other")
    write_other_folder(folder)
    return folder


def test_a_folder_of_other_shapes_and_seeds_is_replayed(other):
    for path in sorted(other.iterdir()):
        rows = REPLAYS[path.name](path)
        assert rows
        assert not [row for row in rows if row.status != "replayed"], path.name


@pytest.mark.parametrize("name", ["step_shared.npz", "step_cross.npz", "step_aligned.npz"])
def test_a_spoilt_number_is_noticed_in_another_folder(other, tmp_path, name):
    spoil(other / name, tmp_path / name)


@pytest.fixture
def without_models(goldens, tmp_path, monkeypatch):
    """Copy the goldens without model folders, and replay them as if none were expected."""
    copy = tmp_path / "copy"
    shutil.copytree(goldens, copy, ignore=shutil.ignore_patterns("student_*", "teacher_*[!n]", "__pycache__"))
    for name in list(REPLAYS):
        if (goldens / name).is_dir() and name != "tokenizers":
            monkeypatch.delitem(REPLAYS, name)
    return copy


def test_unknown_and_missing_files_fail(without_models):
    assert [row.note for row in replay(without_models) if not row.passed] == []
    np.savez(without_models / "novelty.npz", anything=np.zeros(2))
    (without_models / "teacher_novel").mkdir()
    (without_models / "alpha.npz").unlink()
    failed = {row.file: row.note for row in replay(without_models) if not row.passed}
    assert set(failed) == {"novelty.npz", "teacher_novel", "alpha.npz"}
    assert "missing" in failed["alpha.npz"]


def test_a_broken_file_is_a_failing_row_and_the_rest_is_replayed(without_models):
    (without_models / "taid.npz").write_bytes(b"cut short")
    rows = replay(without_models)
    assert {row.file for row in rows if not row.passed} == {"taid.npz"}
    assert any(row.file == "alm.npz" and row.passed for row in rows)


def test_spoilt_tokenizers_fail(without_models):
    file = without_models / "tokenizers" / "info.json"
    info = json.loads(file.read_text())
    info["student_chat_template"] = info["student_chat_template"].replace("im_start", "im_begin")
    file.write_text(json.dumps(info))
    (without_models / "tokenizers" / "third.json").write_text("{}")
    failed = {row.file for row in replay(without_models) if not row.passed}
    # Chats under that template have other ids; map_shared.json brings templates of its own.
    chats = {"map_cross.json", "collate_cross.npz"}
    assert failed == {"tokenizers/info.json", "tokenizers/third.json", *chats}


def test_the_exit_code_says_it(tmp_path, monkeypatch, capsys):
    """An empty folder replays nothing: all families are missing. No folder at all is a usage error."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path)])
    assert main() == 1
    assert capsys.readouterr().out.count("missing from this folder") == len(REPLAYS)
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path / "no")])
    assert main() == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_reader_reports_what_nobody_touched(tmp_path):
    np.savez(tmp_path / "x.npz", seen=np.zeros(2), lost=np.zeros(2), waiting=np.zeros(2))
    golden = Golden(tmp_path / "x.npz")
    golden.compare("seen", [("seen", golden.read("seen") + 1e-7)], 1e-6)
    golden.compare("none", [], 1e-6)
    golden.put_off("waiting", ["waiting"], "later")
    statuses = {row.label: row.status for row in golden.rows()}
    assert statuses == {"seen": "replayed", "none": "failed", "waiting": "later issue", "lost": "failed"}
