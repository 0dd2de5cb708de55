"""Which lambdas a run tells: that of every mixture between student and teacher, at noise level t -> 0."""

import pytest

from tide_megatron.base.clock import Clock
from tide_megatron.losses import LOSSES
from tide_megatron.losses.tidal import Mixture

MIXTURES = {"tidal", "calm_tidal", "reverse_calm_tidal"}


def teacher_shares(losses, clock):
    return {name: found["lambda"] for name, loss in losses.items() if (found := loss.metrics(clock))}


def all_losses():
    return {
        name: kind() if name == "cross_entropy" else kind(teacher="t", weight=0.5)
        for name, kind in LOSSES.items()
    }


def test_every_mixture_has_one_and_nothing_else():
    found = teacher_shares(all_losses(), Clock(step=0, total_steps=4))
    assert found == pytest.approx(dict.fromkeys(MIXTURES, 0.1))
    assert {name for name, kind in LOSSES.items() if issubclass(kind, Mixture)} == MIXTURES


def test_it_is_the_largest_of_the_moment():
    losses = {
        axes: LOSSES["calm_tidal"](teacher="t", axes=axes, growth="linear", initial=0.2, maximum=0.6)
        for axes in ("both", "training_only", "timestep_only")
    }
    found = teacher_shares(losses, Clock(step=1, total_steps=4))
    assert found == pytest.approx({"both": 0.3, "training_only": 0.3, "timestep_only": 0.6})
