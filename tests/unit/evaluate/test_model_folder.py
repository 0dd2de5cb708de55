"""A model folder says what context it was trained in, or the user must."""

import json

import pytest

from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import (
    CONTEXT_FILE,
    context_differences,
    model_of,
    trained_context,
    write_context,
)

STORED = Context(kind="block_causal", block_size=16)


@pytest.mark.parametrize(
    ("kind", "block_size", "wanted"),
    [
        (None, None, STORED),
        ("block_diffusion", None, Context(kind="block_diffusion", block_size=16)),
        (None, 8, Context(kind="block_causal", block_size=8)),
        ("block_diffusion", 4, Context(kind="block_diffusion", block_size=4)),
    ],
)
def test_what_is_asked_for_goes_before_what_is_stored(tmp_path, kind, block_size, wanted):
    write_context(tmp_path, STORED)
    assert trained_context(tmp_path, kind, block_size) == wanted


@pytest.mark.parametrize(("kind", "block_size"), [(None, None), (None, 8), ("block_diffusion", None)])
def test_what_nobody_says_is_not_guessed(tmp_path, kind, block_size):
    with pytest.raises(ConfigError, match="give --context and --block-size"):
        trained_context(tmp_path, kind, block_size)


def test_a_bidirectional_model_needs_no_block_size(tmp_path):
    assert trained_context(tmp_path, "bidirectional").kind == "bidirectional"


@pytest.mark.parametrize("text", ["{", "3", '{"kind": "sideways", "block_size": 4}'])
def test_a_broken_file_is_refused(tmp_path, text):
    (tmp_path / CONTEXT_FILE).write_text(text)
    with pytest.raises(ConfigError):
        trained_context(tmp_path)


BLOCKS, LARGER = Context(kind="block_causal", block_size=16), Context(kind="block_causal", block_size=32)
DIFFUSION, BIDIRECTIONAL = Context(kind="block_diffusion", block_size=16), Context(kind="bidirectional")
KIND, SIZE = "context.kind is {}, it was trained {}", "context.block_size is {}, it was trained with {}"


@pytest.mark.parametrize(
    ("trained", "config", "asked", "said"),
    [
        (BLOCKS, {}, BLOCKS, []),
        (BLOCKS, {"block_size": 32}, BLOCKS, []),
        (BLOCKS, {}, LARGER, [SIZE.format(32, 16)]),
        (BLOCKS, {}, DIFFUSION, [KIND.format("block_diffusion", "block_causal")]),
        (LARGER, {}, DIFFUSION, [KIND.format("block_diffusion", "block_causal"), SIZE.format(16, 32)]),
        (BLOCKS, {}, BIDIRECTIONAL, [KIND.format("bidirectional", "block_causal")]),
        (BIDIRECTIONAL, {}, BIDIRECTIONAL, []),
        (None, {"block_size": 32}, BLOCKS, [SIZE.format(16, 32)]),
        (None, {"block_size": 16}, DIFFUSION, []),
        (None, {"block_size": 32}, BIDIRECTIONAL, []),
        (None, {}, BLOCKS, []),
    ],
)
def test_a_context_is_held_against_what_the_folder_says(tmp_path, trained, config, asked, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if trained:
        write_context(tmp_path, trained)
    assert context_differences(tmp_path, asked) == said


def test_a_run_means_its_student_and_a_run_without_one_is_told(tmp_path):
    assert model_of(tmp_path) == tmp_path, "no run"
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(
        CheckpointError, match=r"no model/ yet, .*; go on with it by tide train .*recipe.yaml"
    ):
        model_of(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert model_of(tmp_path) == tmp_path / "model"
    (tmp_path / "config.json").write_text("{}")
    assert model_of(tmp_path) == tmp_path, "a model folder with a recipe in it"
