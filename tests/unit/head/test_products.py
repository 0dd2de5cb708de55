"""Gradients of bf16 heads are added as fp32 products on CUDA; looked at on tensors that have no memory."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tide_megatron.base.clock import Clock
from tide_megatron.head import tile_passes, tiles
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss
from tide_megatron.head.tiles import product
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.rows import Rows

ROWS, IDS, WIDTH = 7, 300, 16


def on(device, rows, columns, dtype):
    # The factories that the platform points to the CPU where there is no GPU are not asked.
    return torch.empty_strided((rows, columns), (columns, 1), dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("device", "dtype", "given"),
    [
        ("cuda", torch.bfloat16, torch.float32),
        ("cuda", torch.float32, torch.float32),
        ("cpu", torch.bfloat16, torch.bfloat16),  # torch has no other there
        ("cpu", torch.float32, torch.float32),
    ],
)
def test_products_are_fp32_where_the_device_gives_them(device, dtype, given):
    with FakeTensorMode():
        found = product(on(device, 2, 3, dtype), on(device, 3, 4, dtype))
    assert (found.dtype, found.shape, found.device.type) == (given, (2, 4), device)


def test_a_tiles_gradients_are_such_products_added_without_a_rounding(monkeypatch):
    """As a GPU would give them: numbers that bf16 does not have arrive in both gradients."""
    seen = []

    def as_on_cuda(left, right):
        seen.append((left.dtype, right.dtype))
        return left.float() @ right.float()

    monkeypatch.setattr(tile_passes, "product", as_on_cuda)
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, WIDTH, generator=draw).bfloat16() for n in (ROWS, IDS))
    hidden.requires_grad_()
    student = HeadInput(hidden=hidden, weight=weight, gradient=torch.zeros(IDS, WIDTH))
    sample = torch.zeros(ROWS, dtype=torch.int64)
    rows = Rows(gold=torch.arange(ROWS), sample=sample, time=torch.ones(1), maskable=torch.ones(1))
    head = HeadLoss({"ce": CrossEntropy(timestep_weight="uniform")})
    found = head(student, {}, GatheredRows.alone(rows, {"ce": ROWS}), Clock(total_steps=1))
    probabilities = (hidden.detach() @ weight.T).float().softmax(-1)
    dlogits = ((probabilities - torch.eye(ROWS, IDS)) / ROWS).bfloat16().float()
    torch.testing.assert_close(student.gradient, dlogits.T @ hidden.detach().float(), rtol=1e-2, atol=1e-5)
    found.objective.backward()
    assert hidden.grad.isfinite().all()
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    assert (student.gradient != student.gradient.bfloat16().float()).any()


def test_a_torch_without_such_products_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.aten.mm, "overloads", lambda: ["default", "out"])
    tiles._gives_fp32.cache_clear()
    try:
        with FakeTensorMode(), caplog.at_level(logging.WARNING):
            for _ in range(2):
                found = product(on("cuda", 2, 3, torch.bfloat16), on("cuda", 3, 4, torch.bfloat16))
                assert found.dtype is torch.bfloat16
        assert len(caplog.messages) == 1
        assert "rounds each tile of a bf16 head's gradient" in caplog.messages[0]
    finally:
        tiles._gives_fp32.cache_clear()
