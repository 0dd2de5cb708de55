"""What is said of a checkpoint that does not fit the run that wants to go on from it; no tensors here."""

import dataclasses
import json

import pytest

from tests.tiny_run import recipe_tree
from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.metadata import CheckpointMetadata, RunIdentity
from tide_megatron.train.resolve import build_recipe
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


def identity(tree, data="same"):
    return RunIdentity(recipe=tree, recipe_digest="", data=data)


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
