"""Looking up embeddings is torch's embedding, and its gradient torch's, straight in DDP's buffer."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tide_megatron.models.embedding import add_by_id, look_up


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


IDS = {
    "one hot id": [3] * 40 + [5, 3, 9],
    "all distinct": list(range(10)),
    "more tokens than ids": [n % 7 for n in range(50)],
    "one token": [10],
    "none": [],
}


class Operations(TorchDispatchMode):
    """Note the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", IDS)
def test_the_form_for_cuda_adds_what_index_add_does_and_waits_for_nothing(name):
    ids, draw = torch.tensor(IDS[name], dtype=torch.int64), torch.Generator().manual_seed(2)
    rows, table = torch.randn(len(ids), 6, generator=draw), torch.randn(11, 6, generator=draw)
    expected = table.double().index_add(0, ids, rows.double())
    with Operations() as seen:
        add_by_id(table, ids, rows)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-5)
    untouched = torch.ones(11, dtype=torch.bool).index_fill(0, ids, False)
    assert torch.equal(table[untouched], expected[untouched].float())
    waits = {
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "unique_consecutive",
        "masked_select",
    }
    assert not waits & seen.names
    assert "index_put_" not in seen.names, "it adds one occurrence after the other"


def test_other_devices_than_the_cpu_take_it(monkeypatch):
    """Looked at through tensors that say they are elsewhere."""
    taken = []
    monkeypatch.setattr("tide_megatron.models.embedding.add_by_id", lambda *given: taken.append(given))
    table = torch.nn.Parameter(torch.empty(11, 4, device="meta"))
    table.main_grad = torch.empty(11, 4, device="meta")
    rows = look_up(table, torch.empty(2, 7, dtype=torch.int64, device="meta"))
    rows.backward(torch.empty(7, 2, 4, device="meta"))
    ((buffer, ids, added),) = taken
    assert buffer is table.main_grad
    assert (ids.shape, added.shape) == ((14,), (14, 4))
