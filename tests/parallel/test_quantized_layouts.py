"""FP8 models answer in every layout that uncut ones have; what tensor ranks change is told.

Pipeline and expert ranks hold whole matrices, and answer as one rank does. Tensor ranks share the inputs of
the second matrix of a block, and each finds scales of its own part: another rounding of the same numbers.
Rowwise it moves answers about as far as FP8 moves them at all. Powers of two (blockwise) round normal numbers
alike whatever the power, so only the smallest numbers of a block move.
"""

import tide_megatron.platform

import pytest
import torch

from tests.unit.models.shapes import CPU, DENSE, MIXTURE, architecture, view
from tide_megatron.models.build import build_model
from tide_megatron.models.engine import Engine
from tide_megatron.models.precision import Fp8Options
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.teachers.pipeline import forward_views

WIDE = {**DENSE, "hidden_size": 192, "intermediate_size": 288}
"""Tensor ranks cut through its blocks of 128."""
CONFIGS = {"mixture": MIXTURE, "dense": DENSE, "wide": WIDE}
CASES = [
    ("mixture", Layout(expert=4), "rowwise"),
    ("mixture", Layout(pipeline=2, expert=2), "blockwise"),
    ("mixture", Layout(expert=2, expert_tensor=2), "rowwise"),
    ("mixture", Layout(tensor=2, expert=2), "rowwise"),
    ("mixture", Layout(tensor=2, expert=2), "tensorwise"),
    ("dense", Layout(tensor=2, pipeline=2), "rowwise"),
    ("wide", Layout(tensor=2, pipeline=2), "blockwise"),
]


def answers(config, layout, recipe):
    """Return (rows of the cut model, rows of an uncut one, rows without FP8); no first on early stages."""
    read, seen, fp8 = architecture(config), view(config["vocab_size"]), Fp8Options(recipe=recipe)

    def model(layout, fp8, engine):
        options = ModelOptions(device=CPU, layout=layout, fp8=fp8, engine=Engine(name=engine))
        made = build_model(read, make_groups(layout), options)
        draw_weights(made, 1)
        return made

    with torch.no_grad():
        cut = forward_views(model(layout, fp8, "emulated"), [seen])
        uncut = [model(Layout(), *how).rows(seen) for how in ((fp8, "emulated"), (None, "local"))]
    return (cut[0] if cut else None), *uncut


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("name", "layout", "recipe"), CASES, ids=str)
def test_a_cut_model_answers_as_an_uncut_one_unless_tensor_ranks_share_a_scale(pool, name, layout, recipe):
    found = [one for one in pool(4).run(answers, CONFIGS[name], layout, recipe) if one[0] is not None]
    assert len(found) == 4 // layout.pipeline
    for cut, uncut, exact in found:
        moved, rounded = error(cut, uncut), error(uncut, exact)
        print(f"{layout} {recipe}: {moved:.2g} by the cut, {rounded:.2g} by FP8")
        assert 0.01 < rounded < 0.1
        if layout.tensor * layout.expert_tensor == 1:
            assert moved < 1e-6
        elif recipe == "blockwise":
            assert moved < 0.1 * rounded
        else:
            assert 0.1 * rounded < moved < 1.5 * rounded
