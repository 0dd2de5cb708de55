"""Looking up embeddings is torch's embedding, and its gradient torch's, straight in DDP's buffer."""

import pytest
import torch

from tide_megatron.models.lookup import look_up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_gradient_are_torchs(dtype):
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(torch.randn(11, 4, generator=generator).to(dtype))
    table.main_grad = torch.ones(11, 4)  # other microbatches and the head have added to it already
    ids = torch.randint(0, 5, (2, 7), generator=generator)  # [samples, tokens]; ids come back, others never
    incoming = torch.randn(7, 2, 4, generator=generator).to(dtype)

    exact = table.detach().float().requires_grad_()
    expected = torch.nn.functional.embedding(ids, exact).transpose(0, 1)
    expected.backward(incoming.float())
    rows = look_up(table, ids)
    rows.backward(incoming)

    torch.testing.assert_close(rows, expected.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(table.main_grad, 1 + exact.grad, rtol=0, atol=1e-5)
    assert table.grad is None
