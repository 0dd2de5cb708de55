"""Weights in and out on one rank: bit for bit, all faults of a folder in one message."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.unit.models.shapes import (
    CPU,
    DENSE,
    DREAM,
    LLADA,
    LLADA_MOE,
    MIXTURE,
    WEDLM,
    architecture,
    build,
    view,
)
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.base.files import record_digests
from tide_megatron.commands import app
from tide_megatron.models.build import build_model
from tide_megatron.models.hf.folder import WEIGHTS, HfFolder
from tide_megatron.models.params import hf_shapes, local_params
from tide_megatron.models.precision import Precision
from tide_megatron.models.shard import Shard
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import hf_tensors, load_model, read_architecture, save_model

FAMILIES = [DENSE, MIXTURE, WEDLM, LLADA, LLADA_MOE, DREAM]


@pytest.fixture(params=FAMILIES, ids=[config["model_type"] for config in FAMILIES])
def config(request):
    return request.param


@pytest.fixture
def folder(config, groups, tmp_path):
    save_model(build(config, groups), tmp_path / "model")
    return tmp_path / "model"


def fresh(folder, groups, precision="fp32"):
    return build_model(
        read_architecture(folder), groups, ModelOptions(device=CPU, precision=Precision(precision))
    )


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "digests.json").unlink(missing_ok=True)


def test_there_and_back_is_the_same_bytes(config, folder, groups, tmp_path):
    edit(folder, lambda tensors: tensors.update({n: torch.randn_like(t) for n, t in tensors.items()}))
    model = fresh(folder, groups)
    report = load_model(model, folder)
    save_model(model, tmp_path / "again")
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert read_architecture(tmp_path / "again") == architecture(config)
    assert report.bytes_read == sum(tensor.numel() * 4 for tensor in old.values())
    assert report.tensors_read == len(old)
    biases = sum(tensor.numel() for name, tensor in old.items() if name.endswith("expert_bias"))
    assert report.parameters == sum(tensor.numel() for tensor in old.values()) - biases
    told = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: told[key] for key in config} == config
    assert told["torch_dtype"] == "float32"


def test_dtypes_change_on_the_way(config, folder, groups, tmp_path):
    model = fresh(folder, groups, "bf16")
    load_model(model, folder)
    save_model(model, tmp_path / "again", dtype=torch.bfloat16)
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in old.items():
        kept = torch.float32 if name.endswith("expert_bias") else torch.bfloat16
        assert new[name].dtype is kept
        assert torch.equal(new[name], tensor.to(kept))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = fresh(tmp_path / "again", groups)
    report = load_model(half, tmp_path / "again")
    assert report.bytes_read == sum(tensor.numel() * tensor.element_size() for tensor in new.values())
    assert half.head_weight.dtype is torch.float32


def test_loaded_models_compute_the_same(config, folder, groups):
    model, again = build(config, groups), fresh(folder, groups)
    load_model(again, folder)
    seen = view(config["vocab_size"])
    assert torch.equal(model.rows(seen), again.rows(seen))


def test_all_faults_are_told_at_once(config, folder, groups):
    names = architecture(config).names
    norm, missing = (
        f"{names.final_norm}.weight",
        f"{names.layer.format(layer=1)}{names.attention_norm}.weight",
    )

    def change(tensors):
        del tensors[missing]
        tensors["model.layers.9.extra"] = torch.ones(1)
        tensors[norm] = torch.ones(7)

    edit(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(fresh(folder, groups), folder)
    told = str(caught.value)
    assert f"1 missing: {missing}" in told
    assert "1 unknown: model.layers.9.extra" in told
    assert f"1 misshapen: {norm} [7] instead of [32]" in told
    assert str(folder) in told


def test_long_lists_are_cut(groups, tmp_path):
    save_model(build(MIXTURE, groups), tmp_path / "m")
    edit(tmp_path / "m", lambda tensors: [tensors.pop(name) for name in list(tensors) if "experts" in name])
    with pytest.raises(CheckpointError, match=r"54 missing: .*, and 34 more"):
        load_model(fresh(tmp_path / "m", groups), tmp_path / "m")


def test_unknown_model_types_are_refused(tmp_path):
    for text, told in (('{"model_type": "qwen33"}', "did you mean 'qwen3'"), ("{}", "model_type: None")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=told):
            read_architecture(tmp_path)


def test_refusals_name_the_folder(folder, config):
    key = architecture(config).keys.get("hidden_act", "hidden_act")
    (folder / "config.json").write_text(json.dumps({**config, key: "gelu"}))
    with pytest.raises(ConfigError, match=f"{folder.name}: config.json: {key}: 'gelu'"):
        read_architecture(folder)


def test_gradients_take_the_weights_names(groups):
    model = build(DENSE, groups, trainable=True)
    model.rows(view(61)).pow(3).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    renamed = hf_tensors(model, gradients)
    assert {name: tuple(t.shape) for name, t in renamed.items()} == hf_shapes(model.architecture)


def merge_experts(folder):
    """Stack the experts of every layer as dFactory's files do, far from how they stand in the table."""

    def change(tensors):
        for layer in (1, 2):
            for part in ("gate", "up", "down"):
                names = [
                    f"model.layers.{layer}.mlp.experts.{number}.{part}_proj.weight" for number in range(8)
                ]
                stacked = torch.stack([tensors.pop(name) for name in names])
                tensors[f"model.layers.{layer}.mlp.experts.{part}_proj"] = stacked

    edit(folder, change)


def test_merged_experts_are_read_and_written_apart(groups, tmp_path):
    save_model(build(MIXTURE, groups), tmp_path / "m")
    split = load_file(tmp_path / "m" / "model.safetensors")
    merge_experts(tmp_path / "m")
    model = fresh(tmp_path / "m", groups)
    report = load_model(model, tmp_path / "m")
    assert report.bytes_read == sum(tensor.numel() * 4 for tensor in split.values())
    save_model(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == split.keys()
    assert all(torch.equal(again[name], split[name]) for name in split)


def test_a_rank_reads_its_slices_of_merged_experts(groups, tmp_path):
    save_model(build(MIXTURE, groups), tmp_path / "m")
    split = load_file(tmp_path / "m" / "model.safetensors")
    merge_experts(tmp_path / "m")
    shard = Shard(num_layers=3, expert_rank=1, expert_size=4, expert_tensor_rank=1, expert_tensor_size=2)
    with HfFolder(tmp_path / "m") as source:
        for _, piece in local_params(architecture(MIXTURE), shard, merged=True):
            if piece.expert is None:
                continue
            assert piece.expert in (2, 3)
            ours = piece.join([source.read(name, piece.part(name)) for name in piece.sources])
            at = f"model.layers.{piece.layer}.mlp.experts.{piece.expert}."
            if len(piece.sources) == 2:
                wanted = torch.cat([split[f"{at}{part}_proj.weight"][12:] for part in ("gate", "up")])
            else:
                wanted = split[f"{at}down_proj.weight"][:, 12:]
            assert torch.equal(ours, wanted)
        assert source.bytes_read == 4 * 2 * 2 * 3 * 12 * 32, "two layers, two experts, half of three matrices"


def test_misshapen_merged_experts_are_named(groups, tmp_path):
    save_model(build(MIXTURE, groups), tmp_path / "m")
    merge_experts(tmp_path / "m")
    name = "model.layers.1.mlp.experts.up_proj"
    edit(tmp_path / "m", lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    with pytest.raises(CheckpointError, match=rf"1 misshapen: {name} \[7, 24, 32\] instead of \[8, 24, 32\]"):
        load_model(fresh(tmp_path / "m", groups), tmp_path / "m")


def test_weights_with_other_bytes_than_were_written_are_refused(groups, tmp_path):
    save_model(build(DENSE, groups), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other bytes than were written"):
        load_model(fresh(tmp_path / "m", groups), tmp_path / "m")
    load_model(fresh(tmp_path / "m", groups), tmp_path / "m", verify=False)
    (tmp_path / "m" / "digests.json").unlink()
    load_model(fresh(tmp_path / "m", groups), tmp_path / "m")


def test_what_was_downloaded_is_recorded_once(groups, tmp_path):
    save_model(build(DENSE, groups), tmp_path / "m")
    with pytest.raises(CheckpointError, match="is there already"):
        record_digests(tmp_path / "m", WEIGHTS)
    (tmp_path / "m" / "digests.json").unlink()
    told = CliRunner().invoke(app, ["checkpoint", "verify", str(tmp_path / "m"), "--record"])
    assert told.exit_code == 0, told.output
    assert "is whole: 1 files" in " ".join(told.output.split())
    file = tmp_path / "m" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + bytes(byte ^ 1 for byte in content[-4:]))
    with pytest.raises(CheckpointError, match=r"SHA-256 differs"):
        load_model(fresh(tmp_path / "m", groups), tmp_path / "m")
