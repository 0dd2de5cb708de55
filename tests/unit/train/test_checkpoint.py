"""Which checkpoint a run goes on from, and what is said of one it cannot use; no tensors here."""

import dataclasses
import json
from importlib.metadata import version

import pytest

from tests.tiny_run import recipe_tree
from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.train.checkpoint import Origin, find_checkpoint, read_facts
from tide_megatron.train.resolve import build_recipe

CLOCK = Clock(step=3, total_steps=4, consumed=32, skipped=1)


@pytest.fixture
def tree(tmp_path):
    return build_recipe(recipe_tree(tmp_path))[1]


@pytest.fixture
def checkpoint(tmp_path, tree):
    """Write the plain part of a checkpoint and point `latest` at it."""
    folder = tmp_path / "checkpoints/step-00000003-000000000032"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    write(folder, tree)
    (folder.parent / "latest").write_text(folder.name + "\n")
    return folder


def write(folder, tree, **changes):
    facts = {
        "clock": dataclasses.asdict(CLOCK),
        "recipe": tree,
        "data": "same",
        "megatron_core": version("megatron-core"),
    }
    (folder / "state.json").write_text(json.dumps({**facts, **changes}))


def test_a_run_without_a_checkpoint_starts_anew_and_one_with_goes_on(tmp_path, tree, checkpoint):
    assert find_checkpoint(tmp_path / "nowhere") is None
    assert find_checkpoint(checkpoint.parent) == checkpoint
    assert read_facts(checkpoint, Origin(recipe=tree, data="same")) == CLOCK


@pytest.mark.parametrize("name", ["state.json", "metadata.json"])
def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(
        CheckpointError, match=rf"latest names {checkpoint.name}, but .*{name} is missing; write"
    ):
        find_checkpoint(checkpoint.parent)


@pytest.mark.parametrize("content", ["", "step-1\n"])
def test_a_latest_that_names_nothing_is_refused(checkpoint, content):
    (checkpoint.parent / "latest").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"latest names .*state\.json is missing; write the name of a whole"
    ):
        find_checkpoint(checkpoint.parent)


@pytest.mark.parametrize(
    "content",
    ["", '{"clock": {', "[]", "{}", '{"clock": {"steps": 3}, "recipe": {}, "megatron_core": "0.16"}'],
)
def test_a_damaged_state_is_refused(checkpoint, tree, content):
    (checkpoint / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json: not readable .*; choose another checkpoint$"):
        read_facts(checkpoint, Origin(recipe=tree, data="same"))


@pytest.mark.parametrize("recipe", [{}, [], {"batch": 3}])
def test_a_state_with_a_damaged_recipe_is_refused(checkpoint, tree, recipe):
    write(checkpoint, tree, recipe=recipe)
    with pytest.raises(CheckpointError, match=r"state\.json: not readable"):
        read_facts(checkpoint, Origin(recipe=tree, data="same"))


def test_another_recipe_is_refused_with_the_keys_that_differ(checkpoint, tree):
    other = {**tree, "seed": 5, "device": "auto"}
    with pytest.raises(CheckpointError, match=r"another recipe:\n  seed: 3 -> 5\nuse another folder="):
        read_facts(checkpoint, Origin(recipe=other, data="same"))


@pytest.mark.parametrize(("wrote", "is_read"), [("0.1.0", True), ("999.0.0", False), ("999.1.0rc0", False)])
def test_what_a_newer_megatron_wrote_is_refused(checkpoint, tree, wrote, is_read):
    write(checkpoint, tree, megatron_core=wrote)
    if is_read:
        assert read_facts(checkpoint, Origin(recipe=tree, data="same")) == CLOCK
    else:
        with pytest.raises(CheckpointError, match=rf"megatron-core {wrote}; .* install {wrote} or newer$"):
            read_facts(checkpoint, Origin(recipe=tree, data="same"))


def test_data_that_was_prepared_anew_is_refused(checkpoint, tree):
    with pytest.raises(CheckpointError, match=r"data\.train .* was prepared anew since.*--fresh"):
        read_facts(checkpoint, Origin(recipe=tree, data="other"))
