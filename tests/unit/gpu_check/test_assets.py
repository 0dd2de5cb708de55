"""Assets say what they belong to; records of runs are compared without mercy."""

import copy
import subprocess
import sys

import pytest
import torch

from gpu_check import identity
from gpu_check.hidden import hidden_names, hide, machine_packages
from gpu_check.recorded import compare, decoded, encoded


def record(scale=1.0):
    sizes = {"a": 3.0, "b": 1e-3}
    gradients = {name: encoded(torch.tensor([[1.0, -2.0], [0.5, size]])) for name, size in sizes.items()}
    step = {"terms": {"ce": 2.0 * scale, "kl": 1e-9}, "objective": 2.0 * scale, "grad_norm": 4.0}
    return {"steps": [step, copy.deepcopy(step)], "gradients": gradients, "router_gap": 0.1}


def test_a_tensor_goes_through_json():
    tensor = torch.randn(3, 5)
    assert torch.equal(decoded(encoded(tensor)), tensor)


def test_equal_records_have_no_faults():
    figures, faults = compare(record(), record())
    assert not faults
    assert figures["first_loss"] == figures["gradient"] == figures["later_losses"] == 0.0


def spoil_gradient(found):
    found["gradients"]["b"] = encoded(decoded(found["gradients"]["b"]) + 1e-4)


def spoil_term(found):
    found["steps"][0]["terms"]["kl"] = 1e-4


def spoil_norm(found):
    found["steps"][0]["grad_norm"] = 4.001


def spoil_later(found):
    found["steps"][1]["objective"] = 2.01


def spoil_finiteness(found):
    found["gradients"]["a"] = encoded(decoded(found["gradients"]["a"]) * float("nan"))


@pytest.mark.parametrize("spoil", [spoil_gradient, spoil_term, spoil_norm, spoil_later, spoil_finiteness])
def test_compare_sees(spoil):
    found = record()
    spoil(found)
    assert len(compare(found, record())[1]) == 1


def test_assets_of_other_sources_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="make gpu-assets"):
        identity.read_identity(tmp_path)
    here = identity.digest_of()
    assert identity.require_same({"digest": here, "commit": "abc"}, allowed=False) == ""
    other = {"digest": "0" * 16, "commit": "abc"}
    with pytest.raises(SystemExit, match=r"commit abc .*make gpu-assets"):
        identity.require_same(other, allowed=False)
    assert "abc" in identity.require_same(other, allowed=True)


def test_the_digest_is_of_sources(tmp_path):
    (tmp_path / "tide_megatron").mkdir()
    empty = identity.digest_of(tmp_path)
    file = tmp_path / "tide_megatron/step.py"
    file.write_text("x = 1\n")
    first = identity.digest_of(tmp_path)
    file.write_text("x = 2\n")
    assert len({empty, first, identity.digest_of(tmp_path)}) == 3


def test_what_a_bare_machine_lacks_is_hidden(tmp_path):
    assert {"torch", "transformers", "rich"} <= machine_packages()
    names = hidden_names()
    assert "wandb" in names
    assert not {"torch", "megatron", "omegaconf", "pydantic", "tide_megatron"}.intersection(names)
    environment = hide(tmp_path)
    for name, code in (("wandb", 1), ("rich", 0)):
        command = [sys.executable, "-c", f"import {name}"]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == code, done.stderr
        assert code == 0 or b"a bare GPU machine has not got it" in done.stderr
        asked = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
        done = subprocess.run([sys.executable, "-c", asked], env=environment, check=False)
        assert done.returncode == code, "who asks first is told no, and goes on without it"
