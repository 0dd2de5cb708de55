"""Model folders: read lazily, every damage named, written whole or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_run import write_folder
from tide_megatron.base.errors import CheckpointError
from tide_megatron.models.hf.config import read_config
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.shard import Part

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(4)}


@pytest.fixture
def single(tmp_path):
    write_folder(tmp_path / "m", {"model_type": "x"}, TENSORS)
    return tmp_path / "m"


@pytest.fixture
def sharded(single):
    (single / "model.safetensors").unlink()
    save_file({"a": TENSORS["a"]}, single / "one.safetensors")
    save_file({name: TENSORS[name] for name in "bc"}, single / "two.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (single / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return single


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_only_what_is_asked_for_is_read(kind, request):
    with HfFolder(request.getfixturevalue(kind)) as folder:
        assert folder.shapes == {"a": (2, 3), "b": (5,), "c": (4,)}
        assert folder.bytes_read == 0
        assert torch.equal(folder.read("b"), TENSORS["b"])
        assert folder.bytes_read == 10
        folder.read("a")
        assert folder.bytes_read == 34


def refused(folder):
    with pytest.raises(CheckpointError) as caught:
        HfFolder(folder)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_truncated_files_are_named(single, kept):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    told = refused(single)
    assert str(path) in told
    assert "damaged or truncated" in told


def test_garbage_is_named(single):
    (single / "model.safetensors").write_bytes(b"not a tensor file at all" * 10)
    assert "model.safetensors: damaged" in refused(single)


def test_a_truncated_shard_is_named(sharded):
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert str(path) in refused(sharded)


def test_all_missing_shards_are_named(sharded):
    for name in ("one", "two"):
        (sharded / f"{name}.safetensors").unlink()
    assert "not there: one.safetensors, two.safetensors" in refused(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}"])
def test_a_broken_index_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(sharded)


def test_missing_weights(single, tmp_path):
    (single / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(single)
    (single / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights are not read" in refused(single)
    assert "no such model folder" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"])
def test_a_broken_config_is_named(single, text):
    path = single / "config.json"
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(single)


def test_a_folder_replaces_the_old_one_as_a_whole(single, tmp_path):
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    (single / "stale").write_text("")
    write_folder(single, {"new": 1}, {"d": torch.ones(1)}, [extra])
    assert sorted(path.name for path in single.iterdir()) == [
        "config.json",
        "digests.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert load_file(single / "model.safetensors").keys() == {"d"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "tokenizer.json"], "nothing else is left"


def test_a_failed_write_leaves_the_old_folder(single, tmp_path):
    before = (single / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="no such file: cannot be used"):
        write_folder(single, {"new": 1}, TENSORS, [tmp_path / "no such file"])
    assert (single / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failed_rename_puts_the_old_folder_back(single, monkeypatch):
    before = (single / "model.safetensors").read_bytes()
    rename = type(single).rename

    def refuse(path, target):
        if path.name == ".m.partial":
            raise OSError("planted")
        return rename(path, target)

    monkeypatch.setattr(type(single), "rename", refuse)
    with pytest.raises(CheckpointError, match="planted"):
        write_folder(single, {"new": 1}, TENSORS)
    assert (single / "model.safetensors").read_bytes() == before
    assert [path.name for path in single.parent.iterdir()] == ["m"]


def test_leftovers_of_a_killed_write_do_not_matter(single):
    shutil.copytree(single, single.with_name(".m.partial"))
    shutil.copytree(single, single.with_name(".m.old"))
    write_folder(single, {"new": 1}, TENSORS)
    assert read_config(single) == {"new": 1}
    assert [path.name for path in single.parent.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("part", "expected", "num_bytes"),
    [
        (Part(ranges=((1, 2),)), TENSORS["a"][1:], 12),
        (Part(axis=1, ranges=((1, 3),)), TENSORS["a"][:, 1:], 16),
        (Part(axis=1, ranges=((0, 1), (2, 3))), TENSORS["a"][:, ::2], 16),
        (Part(ranges=((1, 2),), zero_rows=1), torch.tensor([[3.0, 4.0, 5.0], [0.0, 0.0, 0.0]]), 12),
        (Part(ranges=((2, 2),)), torch.empty(0, 3), 0),
    ],
)
def test_only_the_part_is_read(single, part, expected, num_bytes):
    with HfFolder(single) as folder:
        assert torch.equal(folder.read("a", part), expected)
        assert folder.bytes_read == num_bytes
