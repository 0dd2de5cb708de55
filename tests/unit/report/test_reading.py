"""What a folder tells, in any state: what is missing is a sentence; a folder of no run's is a fault."""

import json

import pytest

from tests.unit.report.runs import read, write_run
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.report.reading import read_runs


def test_figures_are_those_of_the_records_without_what_is_not_finite(tmp_path, models):
    run = read(write_run(tmp_path / "run", models))
    assert run.notes == []
    assert run.records == 40
    assert run.train["loss"].steps.tolist() == list(range(1, 41))
    assert run.train["loss"].last == 3.0
    assert run.train["loss/kl"].steps.tolist() == [1, 2, *range(4, 41)]
    assert set(run.named("gradient_norm/")) == {"ce", "kl"}
    assert run.scores["nll_per_byte/0.7"].values.tolist() == [2.1, 2.1]
    assert run.recipe is not None
    assert run.ranks == 2
    assert "time" not in run.train


def test_a_line_that_a_kill_cut_short_is_left_out_and_said(tmp_path, models):
    folder = write_run(tmp_path / "run", models, reached=5, result=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"kind": "train", "step": 6, "lo')
    run = read(folder)
    assert run.train["loss"].steps.tolist() == [1, 2, 3, 4, 5]
    torn, bad = run.notes
    assert "the last line of metrics.jsonl is cut short" in torn
    assert bad == "1 line is no JSON object in metrics.jsonl; left out."
    assert run.status.state == "lost"


def test_a_run_without_a_record_and_one_that_never_started_say_so(tmp_path, models):
    folder = write_run(tmp_path / "run", models, reached=0, agreement=False, result=False)
    assert ["no records" in note for note in read(folder).notes] == [True]
    for name in ("metrics.jsonl", "starts.jsonl"):
        (folder / name).unlink()
    run = read(folder)
    assert ["no records" in note for note in run.notes] == [True]
    assert run.ranks is None
    assert run.result == {}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("losses: [", "recipe.yaml is not readable"),
        ("- 1", "recipe.yaml is not readable (it is no mapping)"),
        ("folder: x\nfuture: 3\n", "recipe.yaml is of another release"),
    ],
)
def test_a_recipe_that_cannot_be_read_leaves_the_curves(tmp_path, models, recipe, words):
    folder = write_run(tmp_path / "run", models)
    (folder / "recipe.yaml").write_text(recipe)
    run = read(folder)
    (note,) = run.notes
    assert words in note
    assert run.recipe is None
    assert len(run.train["loss"].steps) == 40


def test_a_recipe_by_epochs_does_not_need_its_data(tmp_path, models):
    folder = write_run(tmp_path / "run", models)
    text = (folder / "recipe.yaml").read_text()
    gone = text.replace("epochs: null", "epochs: 8.0").replace("data/train", "gone")
    assert gone.count("gone") == 1
    (folder / "recipe.yaml").write_text(gone)
    run = read(folder)
    assert run.recipe is not None
    assert run.notes == []


def test_a_result_that_is_none_is_said(tmp_path, models):
    folder = write_run(tmp_path / "run", models)
    (folder / "result.json").write_text("{")
    (note,) = read(folder).notes
    assert "result.json is not readable" in note
    (folder / "result.json").write_text(json.dumps([1]))
    (note,) = read(folder).notes
    assert "it is no object" in note


def test_a_folder_that_is_no_runs_and_one_named_twice_are_refused(tmp_path, models):
    with pytest.raises(CheckpointError, match=r"no run's folder \(recipe.yaml is missing\)"):
        read_runs([tmp_path])
    folder = write_run(tmp_path / "run", models)
    with pytest.raises(ConfigError, match="is named twice"):
        read_runs([folder, tmp_path / "run/../run"])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, models):
    folders = [write_run(tmp_path / part / "run", models) for part in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]
