"""The run folder: whose it is, when it is taken, and that nothing of somebody else's is touched."""

import json
import os

import pytest
import yaml

from tests.tiny_run import recipe_tree
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.train.folder import (
    check_folder,
    claim_folder,
    finished_result,
    has_same_paths,
    write_recipe,
    write_result,
)
from tide_megatron.train.resolve import build_recipe


@pytest.fixture
def tree(tmp_path):
    return build_recipe(recipe_tree(tmp_path))[1]


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def take(folder, tree, *, resume=True):
    check_folder(folder, tree, resume=resume)
    claim_folder(folder, tree, resume=resume)
    write_recipe(folder, tree)


def elsewhere(tree, **more):
    """Return the recipe of a run whose folders were moved."""
    student = {**tree["student"], "folder": "moved/student"}
    return {**tree, "student": student, "data": {"train": "moved/data", "held_out": None}, **more}


def test_looking_at_a_new_folder_makes_nothing_and_taking_it_writes_the_recipe(tmp_path, tree):
    folder = tmp_path / "runs/one"
    check_folder(folder, tree, resume=True)
    assert not (tmp_path / "runs").exists()
    claim_folder(folder, tree, resume=True)
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == tree
    assert list(everything(tmp_path / "runs")) == [(folder / "recipe.yaml").relative_to(tmp_path / "runs")]


def test_the_same_recipe_goes_on_and_may_choose_machines_anew(tmp_path, tree):
    take(tmp_path / "run", tree)
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/latest").write_text("step-1")
    again = {**tree, "device": "auto", "batch": {**tree["batch"], "microbatch": 1}}
    take(tmp_path / "run", again)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-1"
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text()) == again


def test_the_run_of_another_recipe_is_refused_with_the_keys_that_differ(tmp_path, tree):
    take(tmp_path / "run", tree)
    before = everything(tmp_path)
    other = {**tree, "seed": 5, "device": "auto", "data": {**tree["data"], "train": "elsewhere"}}
    with pytest.raises(CheckpointError) as caught:
        check_folder(tmp_path / "run", other, resume=True)
    assert str(caught.value).splitlines() == [
        f"folder: {tmp_path / 'run'} holds the run of another recipe:",
        f"  data.train: {tree['data']['train']!r} -> 'elsewhere'",
        "  seed: 3 -> 5",
        "use another folder=, the old values, or --fresh to discard the old run",
    ]
    assert everything(tmp_path) == before


def test_a_folder_that_was_claimed_keeps_its_recipe_until_the_checkpoint_was_compared(tmp_path, tree):
    take(tmp_path / "run", tree)
    claim_folder(tmp_path / "run", {**tree, "device": "auto"}, resume=True)
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text()) == tree
    claim_folder(tmp_path / "run", {**tree, "device": "auto"}, resume=False)
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["device"] == "auto"


def test_other_paths_are_left_to_the_checkpoint_which_knows_what_lay_there(tmp_path, tree):
    take(tmp_path / "run", tree)
    with pytest.raises(
        CheckpointError, match=r"another recipe:\n  data.held_out: .* -> None\n  data.train: "
    ):
        check_folder(tmp_path / "run", elsewhere(tree), resume=True)
    (tmp_path / "run/checkpoints/step-00000001-000000000008").mkdir(parents=True)
    check_folder(tmp_path / "run", elsewhere(tree), resume=True)
    assert has_same_paths(tmp_path / "run", tree)
    assert not has_same_paths(tmp_path / "run", elsewhere(tree))
    with pytest.raises(CheckpointError) as caught:
        check_folder(tmp_path / "run", elsewhere(tree, seed=5), resume=True)
    keys = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert keys == ["data.held_out", "data.train", "seed", "student.folder"]


@pytest.mark.parametrize(("steps", "is_fine"), [(4, True), (5, True), (400, True), (3, False), (1, False)])
def test_steps_may_be_raised_and_not_lowered(tmp_path, tree, steps, is_fine):
    take(tmp_path / "run", tree)
    if is_fine:
        check_folder(tmp_path / "run", {**tree, "steps": steps}, resume=True)
    else:
        with pytest.raises(CheckpointError, match=rf"another recipe:\n  steps: 4 -> {steps}\n"):
            check_folder(tmp_path / "run", {**tree, "steps": steps}, resume=True)


DONE = {"finished": True, "clock": {"step": 4}, "nll_per_byte": 1.0}


@pytest.mark.parametrize(
    ("result", "steps", "is_over"),
    [
        (DONE, 4, True),
        (DONE, 5, False),  # raised
        (DONE | {"finished": False}, 4, False),
        ({"seconds": 1.0}, 4, False),
        ([], 4, False),
        (None, 4, False),
    ],
)
def test_a_run_is_over_when_its_result_says_so_and_its_student_is_there(
    tmp_path, tree, result, steps, is_over
):
    if result is not None:
        write_result(tmp_path, result)
    assert finished_result(tmp_path, {**tree, "steps": steps}) is None, "no student"
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert finished_result(tmp_path, {**tree, "steps": steps}) == (result if is_over else None)
    (tmp_path / "result.json").write_text("{")
    assert finished_result(tmp_path, tree) is None


@pytest.mark.parametrize("content", ["", "- 1", "seed: 3", "a: [", "student: 3\nteachers: 4\nbatch: 5"])
def test_a_damaged_recipe_in_the_folder_is_refused(tmp_path, tree, content):
    take(tmp_path / "run", tree)
    (tmp_path / "run/recipe.yaml").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"another recipe:\n  recipe.yaml cannot be read as one\n.*--fresh"
    ):
        check_folder(tmp_path / "run", tree, resume=True)


def test_fresh_discards_what_runs_leave_and_nothing_else(tmp_path, tree):
    take(tmp_path / "run", tree)
    for name in (
        "checkpoints/step-1/x",
        "model/config.json",
        "tensorboard/events",
        "wandb/run/x",
        "mine/notes",
    ):
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        (tmp_path / "run" / name).write_text("x")
    for name in ("metrics.jsonl", "result.json", "notes.txt"):
        (tmp_path / "run" / name).write_text("x")
    other = {**tree, "seed": 5}
    check_folder(tmp_path / "run", other, resume=False)
    assert len(everything(tmp_path / "run")) == 9, "looking discards nothing"
    claim_folder(tmp_path / "run", other, resume=False)
    assert sorted(map(str, everything(tmp_path / "run"))) == ["mine/notes", "notes.txt", "recipe.yaml"]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["model", "checkpoints", "result.json"])
def test_files_under_our_names_that_no_run_wrote_are_not_touched(tmp_path, tree, name, resume):
    (tmp_path / "mine" / name).mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=rf"^folder: .*mine holds {name} but no recipe\.yaml.*; choose another"
    ):
        check_folder(tmp_path / "mine", tree, resume=resume)
    assert (tmp_path / "mine" / name).is_dir()


def test_places_where_no_folder_can_be_are_refused(tmp_path, tree):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file/run/one"):
        with pytest.raises(
            ConfigError, match=rf"^folder: {folder} cannot be used: .*file .*; choose another"
        ):
            check_folder(folder, tree, resume=True)
        with pytest.raises(ConfigError, match=rf"^folder: {folder} cannot be used: .*; choose another"):
            claim_folder(folder, tree, resume=True)
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write everywhere
    with pytest.raises(ConfigError, match=rf"^folder: .*run cannot be used: {tmp_path} cannot be written to"):
        check_folder(tmp_path / "run", tree, resume=True)


def test_a_result_replaces_the_old_one_whole(tmp_path):
    write_result(tmp_path, {"seconds": 1.0})
    write_result(tmp_path, {"seconds": 2.0})
    assert json.loads((tmp_path / "result.json").read_text()) == {"seconds": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
