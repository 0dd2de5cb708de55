"""A decoder's pass over the weights against the layers' own, for every architecture; and who takes it."""

import dataclasses

import pytest
import torch

from tests.unit.models.shapes import DENSE, DREAM, LLADA, LLADA_MOE, MIXTURE, WEDLM, build, view
from tide_megatron.models.attention import Dense, PassAttention
from tide_megatron.models.lean import is_lean, lean_rows

CONFIGS = {
    "dense": DENSE,
    "mixture": MIXTURE,
    "wedlm": WEDLM,
    "dream": DREAM,
    "llada": LLADA,
    "llada-moe": LLADA_MOE,
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("trainable", [False, True])
def test_both_ways_give_the_same_rows(groups, config, trainable):
    model = build(CONFIGS[config], groups, trainable=trainable).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.add_(0.2 * spread.to(parameter.dtype))
        seen = view(59, kind="block_causal", samples=3, length=10)
        mask = torch.rand(3, 1, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.5
        reading = PassAttention(kernel=Dense(mask=mask | torch.eye(10, dtype=torch.bool)))
        assert is_lean(model)
        for rows in (seen.rows, torch.tensor([29, 3, 11]), seen.rows[:0]):
            seen = dataclasses.replace(seen, rows=rows)
            wanted = model.rows(seen, reading)
            assert wanted.shape == (len(rows), 32)
            torch.testing.assert_close(lean_rows(model, seen, reading), wanted, rtol=1e-4, atol=1e-4)
