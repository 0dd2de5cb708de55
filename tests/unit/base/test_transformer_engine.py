"""A Transformer Engine that is of no use is named, and megatron-core imports as if it were not there."""

import importlib
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from tide_megatron.base.transformer_engine import find_transformer_engine

NO_DRIVER = "raise OSError('libcuda.so.1: cannot open shared object file')"
OTHER_TORCH = "raise RuntimeError('two lines\\nundefined symbol')"
METADATA = "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.17.1\n"


def broken(folder, body):
    """Install a package that is called like Transformer Engine and does not import."""
    package, facts = folder / "transformer_engine", folder / "transformer_engine-2.17.1.dist-info"
    for part in (package, facts):
        part.mkdir()
    (package / "__init__.py").write_text(f"{body}\n", encoding="utf-8")
    (facts / "METADATA").write_text(METADATA, encoding="utf-8")


@pytest.mark.parametrize(
    ("body", "gpus", "told"),
    [
        (NO_DRIVER, 1, "does not import (OSError: libcuda.so.1: cannot open shared object file)"),
        (OTHER_TORCH, 1, "does not import (RuntimeError: undefined symbol)"),
        (NO_DRIVER, 0, "this process has no CUDA device"),
    ],
    ids=["no driver", "another torch", "no GPU"],
)
def test_one_that_is_of_no_use_is_named_and_hidden(tmp_path, monkeypatch, body, gpus, told):
    broken(tmp_path, body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with mock.patch.dict(sys.modules):
        sys.modules.pop("transformer_engine", None)
        found = find_transformer_engine.__wrapped__()
        assert not found.is_usable
        assert str(found) == f"Transformer Engine 2.17.1 is installed, but {told}"
        with pytest.raises(ImportError):
            importlib.import_module("transformer_engine.pytorch")


def test_megatron_core_imports_beside_one_that_raises_what_it_does_not_catch(tmp_path):
    broken(tmp_path, NO_DRIVER)
    code = (
        "import torch\n"
        "torch.cuda.device_count = lambda: 1\n"
        "import tide_megatron.platform\n"
        "from megatron.core.extensions import transformer_engine\n"
        "from megatron.core.models.gpt import gpt_layer_specs\n"
        "print(transformer_engine.HAVE_TE, gpt_layer_specs.HAVE_TE)"
    )
    places = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": places},
    )
    assert done.stdout.splitlines()[-1:] == ["False False"], done.stderr
