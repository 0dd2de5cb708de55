"""Weights written tensor by tensor: the library of the format reads them, in any order, cut where needed."""

import json
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.hf.safetensors import DTYPES, ShardWriter, TensorSpec, split_plan, write_tensors

TENSORS = {
    "half": torch.arange(3, dtype=torch.bfloat16),
    "double": torch.tensor([[1.5], [2.5]], dtype=torch.float64),
    "byte": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "yes": torch.tensor([True, False, True]),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def plan_of(tensors):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("shard_bytes", [1, 20, 10_000])
def test_the_library_reads_what_was_written_in_any_order(tmp_path, order, shard_bytes):
    write_tensors(tmp_path, plan_of(TENSORS), list(TENSORS.items())[::order], shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    with HfFolder(tmp_path) as folder:
        assert {name: folder.dtype(name) for name in TENSORS} == {n: t.dtype for n, t in TENSORS.items()}
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_stands_at_a_multiple_of_its_own_width(tmp_path):
    write_tensors(tmp_path, plan_of(TENSORS), TENSORS.items())
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    told = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    assert all(told[name]["data_offsets"][0] % t.element_size() == 0 for name, t in TENSORS.items())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_survives(tmp_path, dtype):
    tensor = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]).to(dtype)
    write_tensors(tmp_path, plan_of({"x": tensor}), [("x", tensor)])
    found = load_file(tmp_path / "model.safetensors")["x"]
    assert found.dtype is dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_files_are_filled_as_transformers_does_and_named_by_an_index(tmp_path):
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 1}
    tensors = {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}
    files = split_plan(plan_of(tensors), 7)
    assert [list(file) for file in files.values()] == [["c"], ["a", "b"], ["d", "e"]]
    write_tensors(tmp_path, plan_of(tensors), tensors.items(), 7)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 18}
    assert index["weight_map"] == {name: file for file, run in files.items() for name in run}
    assert list(files) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def test_one_file_has_no_index(tmp_path):
    write_tensors(tmp_path, plan_of(TENSORS), TENSORS.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_missing_or_differs_from_the_plan_is_our_bug(tmp_path):
    with pytest.raises(AssertionError, match="never written: \\['a'\\]"):
        write_tensors(tmp_path, plan_of({"a": torch.ones(1)}), [])
    with pytest.raises(AssertionError, match="planned was"):
        write_tensors(tmp_path, plan_of({"a": torch.ones(1)}), [("a", torch.ones(2))])
    with ShardWriter(tmp_path, plan_of({"a": torch.ones(1)})) as writer:
        writer.write("a", torch.ones(1))
        with pytest.raises(KeyError):
            writer.write("a", torch.ones(1))


def test_only_the_tensor_at_hand_is_in_memory(tmp_path):
    plan = {f"{n}": TensorSpec((1_000_000,), torch.uint8) for n in range(20)}
    tracemalloc.start()
    write_tensors(tmp_path, plan, ((name, torch.zeros(1_000_000, dtype=torch.uint8)) for name in plan))
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()
