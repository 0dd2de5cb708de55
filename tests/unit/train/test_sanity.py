"""A teacher must predict better than token frequencies do."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.mask import Context
from tide_megatron.parallel.layout import Layout
from tide_megatron.teachers.teacher import ViewBuilder
from tide_megatron.train import sanity
from tide_megatron.train.sanity import check_teachers, frequency_nll


class Samples:
    """Stands for a loader over a few samples of one batch."""

    sides = ()

    def __init__(self, ids, maskable):
        self.batch = SimpleNamespace(ids=torch.tensor(ids), maskable=torch.tensor(maskable))
        self.num_samples = len(ids)
        self.asked = None

    def batch_of(self, rows):
        self.asked = list(rows)
        return self.batch

    def of_teacher(self, name, block_size):
        assert (name, block_size) == ("big", 32)
        return self


@pytest.fixture
def samples():
    return Samples([[0, 1, 1, 2], [3, 1, 2, 0]], [[False, True, True, True], [False, True, True, False]])


CHANCE = 0.9260030
"""By hand, of 1 1 2 1 2 among 4 ids: one more of each id makes 1, 4, 3, 1 of 9, so it is log 9 (2.1972246)
less three fifths of log 4 (0.8317766) and two fifths of log 3 (0.4394449)."""


def test_frequencies_are_those_of_maskable_tokens(samples):
    assert frequency_nll(samples, 4) == pytest.approx(CHANCE, abs=1e-6)
    assert samples.asked == [0, 1]


def test_frequencies_that_say_nothing_cost_the_logarithm_of_the_vocabulary():
    assert frequency_nll(Samples([[2, 0, 3, 1]], [[True] * 4]), 4) == pytest.approx(math.log(4))
    assert frequency_nll(Samples([[2, 2, 2, 2]], [[True] * 4]), 4) < math.log(4)


def run_check(monkeypatch, samples, nll, choice, held_out=True):
    asked = []

    def evaluate(scorer, context, loader, options, device):
        asked.append((scorer.teacher, context.kind, loader, options.times))
        return SimpleNamespace(by_time=lambda: [{"nll_per_token": nll}])

    monkeypatch.setattr(sanity, "evaluate", evaluate)
    teacher = SimpleNamespace(
        model=SimpleNamespace(architecture=SimpleNamespace(vocabulary=4)),
        view_builder=ViewBuilder(context=Context(kind="block_causal"), mask_id=3),
    )
    parts = SimpleNamespace(
        held_out=samples if held_out else None,
        loader=Samples([[9]], [[True]]) if held_out else samples,
        run=SimpleNamespace(
            teachers={"big": teacher}, head=SimpleNamespace(group=None), device=torch.device("cpu")
        ),
    )
    layout = Layout(expert=4)
    recipe = SimpleNamespace(teachers={"big": SimpleNamespace(sanity=choice, layout=layout)})
    report = check_teachers(recipe, parts)
    return report, asked, teacher


@pytest.mark.parametrize("held_out", [True, False])
def test_a_teacher_that_knows_something_is_reported(monkeypatch, samples, held_out):
    nll = CHANCE - 0.01
    (entry,), asked, teacher = run_check(monkeypatch, samples, nll, "refuse", held_out)
    assert asked == [(teacher, "block_causal", samples, (0.3,))]
    assert entry == {
        "name": "big",
        "layout": "{expert=4}",
        "nll_per_token": nll,
        "frequency_nll_per_token": pytest.approx(CHANCE, abs=1e-6),
        "time": 0.3,
    }


@pytest.mark.parametrize("nll", [CHANCE + 0.01, 9.0, math.nan, math.inf])
def test_a_teacher_that_knows_nothing_is_refused_with_what_to_check(monkeypatch, samples, nll):
    said = (
        r"^teachers\.big: .*mask token, chat template and context\.kind, or set teachers\.big\.sanity=warn$"
    )
    with pytest.raises(ConfigError, match=said):
        run_check(monkeypatch, samples, nll, "refuse")


def test_the_recipe_may_ask_for_a_warning_or_nothing(monkeypatch, samples, caplog):
    monkeypatch.setattr(logging.getLogger("tide_megatron"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="tide_megatron"):
        report, asked, _ = run_check(monkeypatch, samples, 9.0, "warn")
    assert [entry["nll_per_token"] for entry in report] == [9.0]
    assert "teachers.big: predicts masked tokens at 9.000 nats" in caplog.text
    report, asked, _ = run_check(monkeypatch, samples, 9.0, "off")
    assert (report, asked) == ([], [])
