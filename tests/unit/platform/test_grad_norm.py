"""Gradient norms and clipping by lists of tensors: megatron-core's numbers, without a wait per parameter."""

import importlib.metadata
import importlib.util
import types

import tide_megatron.platform
from tide_megatron.platform import grad_norm
from tide_megatron.platform.grad_norm import foreach_norm, foreach_scale, optimizer_kernels, use_foreach_norm

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from tests.operations import Asked


def gradients(seed=0):
    shapes = [(64, 33), (7,), (1,), (128, 16, 3)]
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + n))
        for n, shape in enumerate(shapes)
    ]


def test_numbers_are_those_of_megatron_cores_stand_ins_bit_for_bit():
    expected, _ = utils.local_multi_tensor_l2_norm(0, None, [gradients()], False)
    with Asked() as asked:
        found, _ = foreach_norm(0, None, [gradients()], False)
    assert torch.equal(found, expected)
    assert not asked.calls
    nowhere = [gradient.to("meta") for gradient in gradients()]  # a device that can be asked for no number
    assert foreach_norm(0, None, [nowhere], False)[0].shape == (1,)
    with pytest.raises(RuntimeError, match="meta"):
        utils.local_multi_tensor_l2_norm(0, None, [nowhere], False)
    scaled, wanted, apart = gradients(), gradients(), gradients(9)
    utils.local_multi_tensor_scale(0, None, [wanted, wanted], 0.3)
    foreach_scale(0, None, [scaled, scaled], 0.3)
    foreach_scale(0, None, [gradients(), apart], 0.3)
    for one, two, three in zip(scaled, wanted, apart, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_megatron_core_uses_them_and_fused_kernels_stay(monkeypatch):
    assert clip_grads.l2_norm_impl is foreach_norm  # neither Transformer Engine nor Apex is installed here
    monkeypatch.setattr(clip_grads, "l2_norm_impl", print)
    assert use_foreach_norm() is False
    assert clip_grads.l2_norm_impl is print


def made_up(module, name):
    return type(name, (), {"__module__": module})


@pytest.mark.parametrize(
    ("kind", "norm", "said"),
    [
        (torch.optim.AdamW, foreach_norm, "torch's AdamW; gradient norm by torch's foreach functions"),
        (
            made_up("transformer_engine.pytorch.optimizers.fused_adam", "FusedAdam"),
            made_up("transformer_engine_torch", "multi_tensor_l2norm"),
            "Transformer Engine's FusedAdam; gradient norm by Transformer Engine's multi_tensor_l2norm",
        ),
        (
            made_up("apex.optimizers.fused_adam", "FusedAdam"),
            made_up("amp_C", "multi_tensor_l2norm"),
            "NVIDIA Apex's FusedAdam; gradient norm by NVIDIA Apex's multi_tensor_l2norm",
        ),
    ],
)
def test_the_log_names_what_really_runs(monkeypatch, kind, norm, said):
    part = types.SimpleNamespace(optimizer=object.__new__(kind))
    empty = types.SimpleNamespace(optimizer=None)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", norm)
    assert optimizer_kernels(part) == said
    assert optimizer_kernels(types.SimpleNamespace(chained_optimizers=[part, empty])) == said


def test_pypis_apex_is_told_from_nvidias(monkeypatch):
    part = types.SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)]))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.10.dev0")
    assert "PyPI's, not NVIDIA's: not used" in optimizer_kernels(part)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not grad_norm.has_foreign_apex()
