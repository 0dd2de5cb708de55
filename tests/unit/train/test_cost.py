"""What MFU is held against: the recipe's word, then the table, else nothing; said once in the log."""

import logging

import pytest
import torch

from tide_megatron.base.device import Device
from tide_megatron.base.memory import peak_memory_bytes
from tide_megatron.train.cost import Devices

CPU = Device(type="cpu", index=0, backend="gloo", threads=1)
GPU = Device(type="cuda", index=0, backend="nccl", threads=1, name="NVIDIA H100 80GB HBM3", capability=(9, 0))


@pytest.mark.parametrize(
    ("device", "dtype", "told", "peak", "words"),
    [
        (GPU, torch.bfloat16, None, 989e12, "989 TFLOP/s a device (NVIDIA H100 80GB HBM3, bfloat16, dense)"),
        (GPU, torch.float32, None, 67e12, "67 TFLOP/s a device (NVIDIA H100 80GB HBM3, float32, dense)"),
        (GPU, torch.bfloat16, 500.0, 500e12, "500 TFLOP/s a device (metrics.peak_tflops)"),
        (CPU, torch.float32, 0.25, 0.25e12, "0.25 TFLOP/s a device (metrics.peak_tflops)"),
        (CPU, torch.float32, None, None, "no peak is known of"),
    ],
)
def test_the_peak_and_why(caplog, device, dtype, told, peak, words):
    caplog.set_level(logging.INFO)
    assert Devices.of(device, dtype, 8, told_tflops=told) == Devices(number=8, peak_flops=peak)
    (line,) = [record.getMessage() for record in caplog.records]
    assert words in line


def test_memory_never_falls():
    before = peak_memory_bytes()
    block = torch.ones(2**24)
    held = peak_memory_bytes()
    del block
    assert before <= held <= peak_memory_bytes()
    assert held > 2**20
