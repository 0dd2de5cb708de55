"""A model folder is known again wherever it lies, and another one is not taken for it."""

import json
import shutil

import pytest

from tide_megatron.base.errors import CheckpointError
from tide_megatron.models.fingerprint import fingerprint

LARGE = 3 * 2**21  # bytes; more than are read whole


@pytest.fixture(params=[1000, LARGE])
def folder(tmp_path, request):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "x", "hidden_size": 8}))
    (tmp_path / "model/model.safetensors").write_bytes(bytes(range(250)) * (request.param // 250))
    return tmp_path / "model"


def test_a_copy_is_the_same_also_with_other_files_beside_it(folder, tmp_path):
    before = fingerprint(folder, weights=True)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("x")
    (copy / "digests.json").write_text("{}")
    config = {"hidden_size": 8, "model_type": "x", "transformers_version": "5.0", "dtype": "float32"}
    (copy / "config.json").write_text(json.dumps(config))
    assert fingerprint(copy, weights=True) == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_other_weights_are_another_model_unless_they_do_not_count(folder, share):
    before = [fingerprint(folder, weights=weights) for weights in (True, False)]
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = int(share * len(content))
    for place in range(start, min(len(content), start + 100_000)):
        content[place] ^= 1
    file.write_bytes(content)
    assert fingerprint(folder, weights=True) != before[0]
    assert fingerprint(folder, weights=False) == before[1]
    file.write_bytes(content + b"0")
    assert fingerprint(folder, weights=True) not in before


def test_another_config_is_another_model(folder):
    before = fingerprint(folder, weights=False)
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "hidden_size": 16}))
    assert fingerprint(folder, weights=False) != before
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        fingerprint(folder, weights=False)
