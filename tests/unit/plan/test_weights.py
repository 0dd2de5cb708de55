"""Bytes by kinds of layers are those of every tensor of a rank."""

import itertools

import pytest
import torch

from tests.unit.models.shapes import DENSE, MIXTURE
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.params import num_local_bytes
from tide_megatron.models.precision import Fp8Options
from tide_megatron.models.shard import Shard
from tide_megatron.parallel.layout import Layout
from tide_megatron.plan.weights import weight_bytes

LAYOUTS = (
    Layout(),
    Layout(tensor=2, pipeline=2),
    Layout(pipeline=2, expert=2),
    Layout(tensor=2, expert_tensor=2),
)


@pytest.mark.parametrize(
    "config", [DENSE, DENSE | {"num_hidden_layers": 5, "tie_word_embeddings": False}, MIXTURE]
)
@pytest.mark.parametrize("fp8", [None, Fp8Options(recipe="rowwise", first_layers=1)])
def test_a_rank_weighs_what_its_tensors_do(config, fp8):
    architecture = ARCHITECTURES[config["model_type"]].from_hf(config)
    for layout, rank, head in itertools.product(LAYOUTS, range(4), [None, (0, 20), (40, 61)]):
        if layout.expert * layout.expert_tensor > 1 and architecture.experts is None:
            continue
        shard = Shard.of(layout, rank, 4, architecture.layers, head=head)
        expected = num_local_bytes(architecture, shard, torch.bfloat16, fp8)
        assert weight_bytes(architecture, shard, torch.bfloat16, fp8) == expected
