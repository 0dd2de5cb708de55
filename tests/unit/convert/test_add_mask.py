"""A model without a mask token gets one: a row, an entry in every tokenizer file, and nothing else."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.small_tokenizer import write_tokenizer
from tests.tiny_run import student_config, write_model
from tide_megatron.base.errors import TideError
from tide_megatron.base.files import damage
from tide_megatron.commands import app
from tide_megatron.convert.add_mask import MaskRow, add_mask
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.weights import check_names, read_architecture
from tide_megatron.text.tokenizer import Tokenizer

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZE = 311
"""Ids of the small tokenizer with these special tokens."""


def write_folder(folder, rows=SIZE, *, tied=True, files=None, special=SPECIAL):
    """Write a model whose tokenizer has no mask token, and further files."""
    write_model(folder, student_config(rows) | {"tie_word_embeddings": tied}, seed=1)
    write_tokenizer(folder, special=special)
    for name, content in ({"README.md": "mine"} | (files or {})).items():
        text = content
        if not isinstance(content, str):
            old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            text = json.dumps(old | content)
        (folder / name).write_text(text)
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [SIZE, SIZE + 1, 320])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_mask_row_is_the_mean_with_noise_and_the_rest_stays(tmp_path, rows, tied, in_place):
    folder = write_folder(tmp_path / "model", rows, tied=tied)
    before, old = weights(folder), shutil.copytree(folder, tmp_path / "old")
    target = None if in_place else tmp_path / "new"
    found = add_mask(folder, target, MaskRow(noise=0.25, seed=7))
    new = target or folder
    assert (found.folder, found.token_id, found.rows_before) == (new, SIZE, rows)
    assert found.rows == max(rows, SIZE + 1)
    after = weights(new)
    matrices = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    assert after.keys() == before.keys()
    assert found.tensors == matrices
    rows_made = []
    for name, tensor in before.items():
        if name not in matrices:
            assert torch.equal(after[name], tensor)
            continue
        assert after[name].shape == (found.rows, tensor.shape[1])
        others = [row for row in range(rows) if row != SIZE]
        assert torch.equal(after[name][others], tensor[others])
        used, made = tensor[:SIZE], after[name][SIZE]
        noise = (made - used.mean(dim=0)) / used.std(dim=0, correction=0)
        assert 0.1 < noise.pow(2).mean().sqrt() < 0.4
        rows_made.append(noise)
    assert tied or not torch.allclose(*rows_made)
    config = json.loads((new / "config.json").read_text())
    assert (config["vocab_size"], config["mask_token_id"]) == (found.rows, SIZE)
    assert (new / "README.md").read_text() == "mine"
    assert damage(new) == []
    with HfFolder(new) as source:
        check_names(read_architecture(new), source)
    if not in_place:
        assert all((old / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())


DECODER = {"added_tokens_decoder": {"0": {"content": "<|pad|>", "special": True}}}
FILES = {
    "nothing more": {},
    "a decoder": {"tokenizer_config.json": DECODER},
    "a map": {"special_tokens_map.json": {"eos_token": "<|im_end|>"}},
    "a decoder and a map": {
        "tokenizer_config.json": DECODER,
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}},
    },
    "a map of nulls": {"special_tokens_map.json": {"eos_token": "<|im_end|>", "mask_token": None}},
    "old additions": {"added_tokens.json": {"<|im_end|>": 2}},
    "nulls": {"tokenizer_config.json": {"mask_token": None}, "config.json": {"mask_token_id": None}},
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("token", ["<|mask|>", "[M\u00c4SK]"])
def test_transformers_reads_the_token_as_the_mask(tmp_path, case, token):
    folder = write_folder(tmp_path / "model", files=FILES[case])
    before = Tokenizer.load(folder, mask=token, add_mask=True)
    kept = json.loads((folder / "tokenizer_config.json").read_text())
    add_mask(folder, None, MaskRow(token=token))
    ours, theirs = Tokenizer.load(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert (theirs.mask_token, theirs.mask_token_id) == (token, SIZE)
    assert (ours.special_tokens["mask_token"], ours.mask_id, ours.mask_was_added) == (token, SIZE, False)
    text = f"def add({token}):\n    pass"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.digest == before.digest, "data that was prepared with an added mask stays good"
    after = json.loads((folder / "tokenizer_config.json").read_text())
    assert {key: after[key] for key in kept if key not in ("mask_token", "added_tokens_decoder")} == {
        key: value for key, value in kept.items() if key not in ("mask_token", "added_tokens_decoder")
    }


def test_a_tied_head_that_is_stored_as_well_stays_equal(tmp_path):
    folder = write_folder(tmp_path / "model", tied=False)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(folder)
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, folder / "model.safetensors")
    (folder / "digests.json").unlink()
    assert add_mask(folder, None, MaskRow()).tensors == [EMBEDDING, HEAD]
    assert torch.equal(weights(folder)[EMBEDDING], weights(folder)[HEAD])


@pytest.mark.parametrize(
    ("files", "special", "token", "message"),
    [
        ({"tokenizer_config.json": {"mask_token": "<|im_start|>"}}, SPECIAL, "<|mask|>", "has a mask token"),
        (
            {"special_tokens_map.json": {"mask_token": "<|im_start|>"}},
            SPECIAL,
            "<|mask|>",
            "has a mask token",
        ),
        (
            {"config.json": {"mask_token_id": 1}},
            SPECIAL,
            "<|mask|>",
            "mask_token_id says 1: the model has a mask",
        ),
        (
            {},
            (*SPECIAL, "<|mask|>"),
            "<|mask|>",
            "the tokenizer has '<|mask|>' (id 3); if the model was trained",
        ),
        ({}, SPECIAL, "<|im_end|>", "also the end or padding token"),
        ({}, SPECIAL, "e", "'e' is ordinary text"),
        ({}, SPECIAL, " ", "--token: ' ' is no token"),
        ({"config.json": "{"}, SPECIAL, "<|mask|>", "config.json: not readable as JSON"),
        ({"config.json": {"vocab_size": 200}}, SPECIAL, "<|mask|>", "has 311 ids, its model only 200 rows"),
        ({"model.safetensors": "cut"}, SPECIAL, "<|mask|>", "model.safetensors has 3 bytes instead of"),
    ],
)
def test_what_has_a_mask_or_cannot_have_one_is_left_as_it_was(tmp_path, files, special, token, message):
    folder = write_folder(tmp_path / "model", 320, files=files, special=special)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for target in (None, tmp_path / "new"):
        with pytest.raises(TideError) as caught:
            add_mask(folder, target, MaskRow(token=token))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_command_says_what_it_did_and_does_it_once(tmp_path):
    folder = write_folder(tmp_path / "model", 320)
    words = ["model", "add-mask", str(folder), str(tmp_path / "new")]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"mask token <|mask|> has id {SIZE}; 320 rows (320 before) in {EMBEDDING}" in result.output
    with pytest.raises(TideError, match="new: exists"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    with pytest.raises(TideError, match="the model has a mask token"):
        CliRunner().invoke(app, [*words[:2], str(tmp_path / "new")], catch_exceptions=False)
