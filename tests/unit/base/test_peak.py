"""Peaks by name, as torch gives names of GPUs."""

import pytest
import torch

from tide_megatron.base.peak import peak_flops

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA H20", 148e12, 44e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA B200", 2250e12, None),
    ],
)
def test_known_names(name, half, single):
    assert (peak_flops(name, BF16), peak_flops(name, FP32)) == (half, single)


@pytest.mark.parametrize(
    "name", ["x86_64", "", "NVIDIA GB200", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 3090"]
)
def test_others_have_none(name):
    assert peak_flops(name, BF16) is None


def test_only_dtypes_that_models_have():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float64) is None
