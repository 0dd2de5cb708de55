"""Which bytes are taken as weights: transformers' order of files, tied heads, holes, buffers, mask rows.

Folders are tiny Qwen3s that transformers saved; what it reads from the same files is what we must read.
"""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.unit.models.shapes import CPU, LLADA, MIXTURE, build
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.stop import StopFlag
from tide_megatron.convert.hf_to_megatron import hf_to_megatron
from tide_megatron.models.build import build_model
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.hf.safetensors import INDEX_FILE, WEIGHTS_FILE
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import load_model, read_architecture, save_model

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return folders that transformers saved: by whether the head is tied, each whole and in shards."""
    folders = {}
    for is_tied in (True, False):
        torch.manual_seed(5)
        config = Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=is_tied,
        )
        model = Qwen3ForCausalLM(config)
        for size in ("1GB", "20KB"):
            path = tmp_path_factory.mktemp("theirs")
            model.save_pretrained(path, max_shard_size=size)
            folders[is_tied, size] = path
    return folders


@pytest.fixture(autouse=True)
def _our_log_is_heard(monkeypatch):
    monkeypatch.setattr(logging.getLogger("tide_megatron"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("tide_megatron"), "level", logging.WARNING)


@pytest.fixture
def folder_of(saved, tmp_path):
    """Return a way to get a copy of one."""

    def copied(is_tied=True, size="1GB", name="m"):
        return shutil.copytree(saved[is_tied, size], tmp_path / name)

    return copied


def theirs(folder):
    """Return what transformers reads."""
    return Qwen3ForCausalLM.from_pretrained(folder).state_dict()


def ours(folder, groups, tmp_path):
    """Return what we read, under Hugging Face's names."""
    model = build_model(read_architecture(folder), groups, ModelOptions(device=CPU))
    load_model(model, folder)
    save_model(model, tmp_path / "again")
    return load_file(tmp_path / "again" / WEIGHTS_FILE)


def same(folder, groups, tmp_path):
    """Say whether both read the same values."""
    expected, found = theirs(folder), ours(folder, groups, tmp_path)
    return all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def edit(folder, change, file=WEIGHTS_FILE):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def places(folder):
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"]


def write_places(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def add_stale_shards(folder, shards):
    for file in shards.glob("model*.safetensors*"):
        shutil.copy(file, folder)
    for file in folder.glob("model-*.safetensors"):
        edit(folder, lambda tensors: [tensor.add_(1) for tensor in tensors.values()], file.name)


def test_a_stale_index_beside_a_whole_file_is_not_read(folder_of, saved, groups, tmp_path, caplog):
    folder = folder_of()
    add_stale_shards(folder, saved[True, "20KB"])
    assert same(folder, groups, tmp_path)
    assert f"{WEIGHTS_FILE} is read, not the files that {INDEX_FILE}" in caplog.text


def test_an_index_whose_shards_are_gone_does_not_matter_beside_a_whole_file(folder_of, groups, tmp_path):
    folder = folder_of()
    write_places(folder, {TABLE: "model-00001-of-00002.safetensors"})
    assert same(folder, groups, tmp_path)


def test_an_index_of_the_whole_file_alone_is_nothing_odd(folder_of, groups, tmp_path, caplog):
    folder = folder_of()
    write_places(folder, dict.fromkeys(load_file(folder / WEIGHTS_FILE), WEIGHTS_FILE))
    assert same(folder, groups, tmp_path)
    assert "stale" not in caplog.text


def test_shards_are_read_as_transformers_reads_them(folder_of, groups, tmp_path, caplog):
    folder = folder_of(size="20KB")
    assert len({*places(folder).values()}) > 2
    assert same(folder, groups, tmp_path)
    assert not warnings_in(caplog)


@pytest.mark.parametrize("wins", ["first", "last"])
def test_a_tensor_in_two_shards_comes_from_the_one_that_the_index_names(
    folder_of, groups, tmp_path, caplog, wins
):
    """transformers takes the last file's whatever the index says, so the two agree on `last`."""
    folder = folder_of(size="20KB")
    weight_map = places(folder)
    first, last = min(weight_map.values()), max(weight_map.values())
    values = {first: torch.full((32,), 2.0), last: torch.full((32,), 3.0)}
    for file, value in values.items():
        edit(folder, lambda tensors, value=value: tensors.update({NORM: value}), file)
    named = first if wins == "first" else last
    write_places(folder, weight_map | {NORM: named})
    if weight_map[NORM] not in values:
        edit(folder, lambda tensors: tensors.pop(NORM), weight_map[NORM])
    assert torch.equal(ours(folder, groups, tmp_path)[NORM], values[named])
    assert torch.equal(theirs(folder)[NORM], values[last])
    assert f"{NORM} (from {named}, not " in caplog.text


def test_a_tensor_that_only_one_shard_has_needs_no_entry(folder_of, groups, tmp_path):
    folder = folder_of(size="20KB")
    write_places(folder, {name: file for name, file in places(folder).items() if name != NORM})
    assert same(folder, groups, tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weight_map: weight_map | {NORM: weight_map[TABLE]}, f"{NORM} in model-"),
        (lambda weight_map: weight_map | {"extra": weight_map[TABLE]}, "extra in model-"),
        (lambda weight_map: weight_map | {NORM: "../elsewhere.safetensors"}, "is not inside the folder"),
        (lambda weight_map: weight_map | {NORM: "/elsewhere.safetensors"}, "is not inside the folder"),
        (lambda weight_map: weight_map | {NORM: "gone.safetensors"}, "not there: gone.safetensors"),
    ],
    ids=["other file", "nowhere", "above", "absolute", "gone"],
)
def test_an_index_that_does_not_fit_its_files_is_refused(folder_of, change, told):
    folder = folder_of(size="20KB")
    write_places(folder, change(places(folder)))
    with pytest.raises(CheckpointError, match=told):
        HfFolder(folder)


def test_a_tensor_in_two_shards_and_no_entry_is_refused(folder_of):
    folder = folder_of(size="20KB")
    weight_map = places(folder)
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    edit(folder, lambda tensors: tensors.update({NORM: torch.ones(32)}), other)
    write_places(folder, {name: file for name, file in weight_map.items() if name != NORM})
    with pytest.raises(CheckpointError, match=f"{NORM} is in .* does not say which is meant"):
        HfFolder(folder)


def test_the_same_copy_of_a_tied_head_is_ignored(folder_of, groups, tmp_path):
    folder = folder_of()
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[TABLE].clone()}))
    assert same(folder, groups, tmp_path)
    model = build_model(read_architecture(folder), groups, ModelOptions(device=CPU))
    assert load_model(model, folder).bytes_read == 4 * sum(p.numel() for p in model.parameters())


def one_off(table):
    head = table.clone()
    head[-1, -1] += 1e-3
    return head


@pytest.mark.parametrize(
    "head",
    [torch.ones_like, torch.zeros_like, lambda table: table[:-1].clone(), one_off],
    ids=["ones", "zeros", "short", "one number"],
)
def test_another_head_under_a_tied_config_is_refused_where_transformers_unties_it(folder_of, groups, head):
    folder = folder_of()
    edit(folder, lambda tensors: tensors.update({HEAD: head(tensors[TABLE])}))
    model = build_model(read_architecture(folder), groups, ModelOptions(device=CPU))
    with pytest.raises(CheckpointError, match=f"tie_word_embeddings: True, but {HEAD} differs from {TABLE}"):
        load_model(model, folder)
    if len(load_file(folder / WEIGHTS_FILE)[HEAD]) == 61:
        read = theirs(folder)
        assert not torch.equal(read[HEAD], read[TABLE])


def test_an_untied_head_may_be_any(folder_of, groups, tmp_path):
    assert same(folder_of(is_tied=False), groups, tmp_path)


def test_a_familys_own_word_for_tied_is_named(groups, tmp_path):
    save_model(build({**LLADA, "weight_tying": True}, groups), tmp_path / "m")
    name = "model.transformer.ff_out.weight"
    (tmp_path / "m" / "digests.json").unlink()
    edit(tmp_path / "m", lambda tensors: tensors.update({name: torch.ones(61, 32)}))
    model = build_model(read_architecture(tmp_path / "m"), groups, ModelOptions(device=CPU))
    with pytest.raises(CheckpointError, match="weight_tying: True, but"):
        load_model(model, tmp_path / "m")


@pytest.mark.parametrize(
    "buffers",
    [
        ["model.rotary_emb.inv_freq"],
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"],
    ],
)
def test_rotary_buffers_are_harmless_as_for_transformers(folder_of, groups, tmp_path, caplog, buffers):
    folder = folder_of()
    right = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    edit(folder, lambda tensors: tensors.update({name: right.clone() for name in buffers}))
    assert same(folder, groups, tmp_path)
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    "name", ["model.position_ids", "model.layers.0.self_attn.masked_bias", "model.causal_mask"]
)
def test_other_old_buffers_are_harmless(folder_of, groups, tmp_path, name):
    folder = folder_of()
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(1)}))
    assert same(folder, groups, tmp_path)


def test_frequencies_of_another_model_are_a_warning(folder_of, groups, tmp_path, caplog):
    folder = folder_of()
    name = "model.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: 1e6 ** -(torch.arange(0, 16, 2) / 16)}))
    assert same(folder, groups, tmp_path)
    assert f"rotary frequencies in the file are not those that config.json asks for: {name}" in caplog.text


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.bias_table", "model.inv_freq", "rotary.scale"])
def test_other_tensors_that_nobody_knows_are_refused(folder_of, groups, name):
    folder = folder_of()
    edit(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(CheckpointError, match=f"1 unknown: {name}"):
        load_model(build_model(read_architecture(folder), groups, ModelOptions(device=CPU)), folder)


@pytest.mark.parametrize(
    ("zero", "told"),
    [([UP], f"1 tensors are all zeros: {UP}"), ([NORM], f"1 tensors are all zeros: {NORM}"), ([], None)],
)
def test_tensors_of_zeros_are_a_warning(folder_of, groups, tmp_path, caplog, zero, told):
    folder = folder_of()
    edit(folder, lambda tensors: [tensors[name].zero_() for name in zero])
    assert same(folder, groups, tmp_path)
    assert (told in caplog.text) if told else not warnings_in(caplog)


def test_a_shard_of_zeros_is_a_warning_that_names_its_tensors(folder_of, groups, tmp_path, caplog):
    folder = folder_of(size="20KB")
    file = places(folder)[UP]
    edit(folder, lambda tensors: [tensor.zero_() for tensor in tensors.values()], file)
    assert same(folder, groups, tmp_path)
    names = load_file(folder / file)
    assert f"{len(names)} tensors are all zeros" in caplog.text
    assert UP in caplog.text


def test_biases_of_zeros_are_nothing_odd(groups, tmp_path, caplog):
    save_model(build(MIXTURE, groups), tmp_path / "m")
    assert not load_file(tmp_path / "m" / WEIGHTS_FILE)["model.layers.1.mlp.gate.expert_bias"].any()
    load_model(
        build_model(read_architecture(tmp_path / "m"), groups, ModelOptions(device=CPU)), tmp_path / "m"
    )
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    ("told", "asked", "factor", "is_odd"),
    [
        (None, 60, 1e-3, True),
        (60, None, 1e-3, True),
        (60, None, 0.0, True),
        (7, 60, 1e-3, True),
        (60, 7, 1e-3, False),
        (None, None, 0.0, False),
        (60, 60, 1.0, False),
        (60, 60, 0.5, False),
        (61, None, 0.0, False),
    ],
)
def test_a_mask_row_near_zero_is_a_warning(folder_of, groups, caplog, told, asked, factor, is_odd):
    folder = folder_of()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": told}))
    edit(folder, lambda tensors: tensors[TABLE][60].mul_(factor))
    model = build_model(read_architecture(folder), groups, ModelOptions(device=CPU))
    with caplog.at_level(logging.WARNING):
        load_model(model, folder, mask_id=asked)
    assert ("the embedding of the mask token (id 60)" in caplog.text) is is_odd


def convert(folder, tmp_path):
    hf_to_megatron(folder, tmp_path / "megatron", None, False, device=CPU, stop=StopFlag())


def test_a_conversion_has_the_same_doubts(folder_of, saved, groups, tmp_path, caplog):
    folder = folder_of()
    add_stale_shards(folder, saved[True, "20KB"])
    edit(folder, lambda tensors: tensors[UP].zero_())
    convert(folder, tmp_path)
    assert f"1 tensors are all zeros: {UP}" in caplog.text
    assert f"{WEIGHTS_FILE} is read, not the files that {INDEX_FILE}" in caplog.text


def test_a_conversion_refuses_another_head_under_a_tied_config(folder_of, groups, tmp_path):
    folder = folder_of()
    edit(folder, lambda tensors: tensors.update({HEAD: one_off(tensors[TABLE])}))
    with pytest.raises(CheckpointError, match=f"{HEAD} differs from {TABLE}"):
        convert(folder, tmp_path)
    assert not (tmp_path / "megatron").exists()


def test_weights_of_whole_numbers_are_refused(folder_of, groups):
    folder = folder_of()
    edit(folder, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=f"1 of whole numbers: {UP} torch.int8"):
        load_model(build_model(read_architecture(folder), groups, ModelOptions(device=CPU)), folder)


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]
