"""A pass is compiled once for each kind of inputs, whatever their rows, and never left uncompiled."""

import logging

import pytest
import torch

from tide_megatron.base.errors import TideError
from tide_megatron.head.compiler import PassCompiler


def scaled(factor, tensors, other):
    """Stand for a pass: options first, then tensors in lists, tuples and None."""
    return [tensor.sum(-1) * factor for tensor in tensors], other


def inputs(rows, columns=4, others=3):
    return [torch.ones(rows, columns), torch.ones(others, columns)], None


def test_rows_may_vary_and_nothing_else(caplog):
    compiler = PassCompiler(lambda graph, inputs: graph)
    with caplog.at_level(logging.INFO):
        for rows in (5, 6, 90):
            (found, _), _ = compiler.run(scaled, (2.0,), *inputs(rows))
            assert found.tolist() == [8.0] * rows
        assert compiler.compilations == 1
        kinds = [(3.0, inputs(5)), (2.0, inputs(1)), (2.0, inputs(3)), (2.0, inputs(5, columns=6))]
        for number, (factor, given) in enumerate(kinds):
            compiler.run(scaled, (factor,), *given)
            compiler.run(scaled, (factor,), *given)
            assert compiler.compilations == number + 2, "other options, one row, equal rows, columns"
    assert caplog.messages[0] == "head loss: compiling scaled, graph 1"


def test_what_torch_leaves_uncompiled_ends_the_run(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pytest.raises(
        TideError, match=r"^head\.compiled: torch\.compile left .* uncompiled, .* set it to f"
    ):
        PassCompiler().run(scaled, (2.0,), *inputs(5))
