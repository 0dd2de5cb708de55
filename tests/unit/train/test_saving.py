"""What is said of a checkpoint that does not fit the run that wants to go on from it; no tensors here."""

import copy
import dataclasses
import functools
import json
import logging

import pytest

from tests.tiny_run import recipe_tree
from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.metadata import CheckpointMetadata, RunIdentity
from tide_megatron.train.resolve import build_recipe
from tide_megatron.train.same_run import with_steps
from tide_megatron.train.saving import checked_clock

CLOCK = Clock(step=3, total_steps=4, consumed=32, skipped=1)


@pytest.fixture
def tree(tmp_path):
    return build_recipe(recipe_tree(tmp_path))[1]


@pytest.fixture
def checkpoint(tmp_path, tree):
    """Write the plain part of a checkpoint."""
    folder = tmp_path / "checkpoints/step-00000003-000000000032"
    folder.mkdir(parents=True)
    write(folder, tree)
    return folder


THERE = {"student.folder": "s", "teachers.moe.folder": "t", "data.held_out": "h"}


def identity(tree, data="same", **contents):
    names = {"student": "student.folder", "teacher": "teachers.moe.folder", "held_out": "data.held_out"}
    changed = {names[name]: value for name, value in contents.items()}
    return RunIdentity(recipe=tree, recipe_digest="", data=data, contents=THERE | changed)


def moved(tree, *keys):
    """Return a recipe with other paths."""
    tree = copy.deepcopy(tree)
    for key in keys:
        *path, last = key.split(".")
        functools.reduce(dict.__getitem__, path, tree)[last] = "elsewhere"
    return tree


PATHS = ("student.folder", "teachers.moe.folder", "data.train", "data.held_out")


def write(folder, tree, **changes):
    metadata = CheckpointMetadata.now(identity(tree), CLOCK, [3], {}, 2)
    dataclasses.replace(metadata, **changes).write(folder)


def test_a_checkpoint_of_this_run_tells_the_clock(tree, checkpoint):
    assert checked_clock(checkpoint, identity(tree)) == CLOCK


@pytest.mark.parametrize(
    "content",
    ["", '{"clock": {', "[]", "{}", '{"clock": {"steps": 3}, "recipe": {}, "megatron_core": "0.16"}'],
)
def test_a_damaged_state_is_refused(checkpoint, tree, content):
    (checkpoint / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json: not readable .*; choose another checkpoint$"):
        checked_clock(checkpoint, identity(tree))


@pytest.mark.parametrize(
    ("key", "value"), [("recipe", []), ("ranks", "two"), ("optimizer_steps", 3), ("clock", {"step": "x"})]
)
def test_a_state_with_a_value_of_another_kind_is_refused_by_its_key(checkpoint, tree, key, value):
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, key: value}))
    with pytest.raises(CheckpointError, match=rf"not readable \({key}.*: Input should be .*; choose another"):
        checked_clock(checkpoint, identity(tree))


@pytest.mark.parametrize("recipe", [{}, {"batch": 3}])
def test_a_state_with_a_damaged_recipe_is_refused(checkpoint, tree, recipe):
    write(checkpoint, recipe)
    said = r"(its recipe is|state\.json:) not readable .*; (remove it|choose another checkpoint)$"
    with pytest.raises(CheckpointError, match=said):
        checked_clock(checkpoint, identity(tree))


def test_another_recipe_is_refused_with_the_keys_that_differ(checkpoint, tree):
    other = {**tree, "seed": 5, "device": "auto"}
    with pytest.raises(CheckpointError, match=r"another recipe:\n  seed: 3 -> 5\nuse another folder="):
        checked_clock(checkpoint, identity(other))


@pytest.mark.parametrize("keys", [(), *((key,) for key in PATHS), PATHS])
def test_folders_that_were_moved_are_known_by_what_lies_in_them(checkpoint, tree, keys):
    assert checked_clock(checkpoint, identity(moved(tree, *keys))) == CLOCK


@pytest.mark.parametrize(
    ("keys", "now", "said"),
    [
        (PATHS, {"teacher": "u"}, r"teachers\.moe\.folder was .*teacher, and elsewhere holds another model"),
        (PATHS, {"student": "u"}, r"student\.folder was .*student, and elsewhere holds another model"),
        (PATHS, {"data": "other"}, r"data\.train elsewhere was prepared anew since"),
        (("teachers.moe.folder",), {"teacher": "u"}, r"and elsewhere holds another model or tokenizer\n"),
    ],
)
def test_folders_that_were_exchanged_are_refused(checkpoint, tree, keys, now, said):
    with pytest.raises(CheckpointError, match=said):
        checked_clock(checkpoint, identity(moved(tree, *keys), **now))


@pytest.mark.parametrize(
    ("keys", "now", "said"),
    [
        ((), {"teacher": "u"}, "teachers.moe.folder: holds another model or tokenizer than when"),
        ((), {"held_out": "u"}, "data.held_out: is other data than before"),
        (("data.held_out",), {"held_out": "u"}, "data.held_out: is other data than before"),
    ],
)
def test_what_changed_in_its_place_is_said(checkpoint, tree, caplog, monkeypatch, keys, now, said):
    monkeypatch.setattr(logging.getLogger("tide_megatron"), "propagate", True)
    assert checked_clock(checkpoint, identity(moved(tree, *keys), **now)) == CLOCK
    assert said in caplog.text


def test_checkpoints_of_old_releases_go_on_where_their_models_were(checkpoint, tree):
    """They do not say what lay there; of data they do."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["contents"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    for keys in ((), ("data.train",), ("data.held_out",)):
        assert checked_clock(checkpoint, identity(moved(tree, *keys))) == CLOCK
    with pytest.raises(CheckpointError, match=r"cannot be compared .* put a link at .*teacher, go on"):
        checked_clock(checkpoint, identity(moved(tree, "teachers.moe.folder")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "learning rate 0.00146 -> 0.008, losses.mix lambda 0.783 -> 0.111"),
        ({"schedule": "constant"}, "losses.mix lambda"),
        ({"schedule": "constant", "warmup": 0.0}, "losses.mix lambda"),
    ],
)
def test_raised_steps_are_told_with_what_they_change(tree, caplog, monkeypatch, changes, said):
    monkeypatch.setattr(logging.getLogger("tide_megatron"), "propagate", True)
    tree["losses"]["mix"] = {"kind": "tidal", "teacher": "moe"}
    tree["optimizer"] |= changes
    recipe, _ = build_recipe({**tree, "steps": 40})
    assert with_steps(CLOCK, recipe) == dataclasses.replace(CLOCK, total_steps=40)
    assert "steps: raised from 4 to 40; from step 3 on the schedules are those of a run of 40" in caplog.text
    assert said in caplog.text
    caplog.clear()
    assert with_steps(CLOCK, build_recipe(tree)[0]) == CLOCK
    assert not caplog.text


def test_nothing_depends_on_raised_steps_under_constant_schedules(tree, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tide_megatron"), "propagate", True)
    tree["optimizer"] |= {"schedule": "constant", "warmup": 0.0}
    with_steps(CLOCK, build_recipe({**tree, "steps": 40})[0])
    assert "nothing depends on them" in caplog.text


@pytest.mark.parametrize(("wrote", "is_read"), [("0.1.0", True), ("999.0.0", False), ("999.1.0rc0", False)])
def test_what_a_newer_megatron_wrote_is_refused(checkpoint, tree, wrote, is_read):
    write(checkpoint, tree, megatron_core=wrote)
    if is_read:
        assert checked_clock(checkpoint, identity(tree)) == CLOCK
    else:
        with pytest.raises(CheckpointError, match=rf"megatron-core {wrote}; .* install {wrote} or newer$"):
            checked_clock(checkpoint, identity(tree))


def test_data_that_was_prepared_anew_is_refused(checkpoint, tree):
    with pytest.raises(CheckpointError, match=r"data\.train .* was prepared anew since.*--fresh"):
        checked_clock(checkpoint, identity(tree, data="other"))


def test_the_other_form_of_optimizer_state_is_refused_by_name(checkpoint, tree):
    other = {**tree, "optimizer": {**tree["optimizer"], "distributed": False}}
    with pytest.raises(CheckpointError, match=r"go on with optimizer\.distributed=True$"):
        checked_clock(checkpoint, identity(other))
