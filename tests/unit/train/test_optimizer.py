"""The rate as a function of the clock, and what an update does to weights: clip, decay, skip, masters.

The objective is the sum of all weights times a number, so every gradient element is that number (times the
ranks, which add up), and the global norm is known in closed form.
"""

import math

import pytest
import torch
import torch.distributed as dist

from tests.unit.models.shapes import CPU, DENSE, MIXTURE, architecture
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.mask import Context
from tide_megatron.models.build import build_model
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.collectives import sum_over
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.train.optimizer import learning_rate
from tide_megatron.train.recipe import Optimizer
from tide_megatron.train.student import Student

RATE = 0.5
SGD = {"name": "sgd", "learning_rate": RATE, "schedule": "constant", "warmup": 0.0}
ADAMW = {**SGD, "name": "adamw", "learning_rate": 0.01}


def rates(total, **options):
    chosen = Optimizer(learning_rate=RATE, **options)
    return [learning_rate(chosen, Clock(step=step, total_steps=total)) for step in range(total)]


def test_the_rate_warms_up_in_equal_steps_and_then_follows_half_a_cosine():
    found = rates(20, warmup=0.25)
    assert found[:5] == pytest.approx([RATE * part / 6 for part in (1, 2, 3, 4, 5)])
    assert found[5:] == pytest.approx(
        [RATE * 0.5 * (1 + math.cos(math.pi * done / 15)) for done in range(15)]
    )
    assert max(found) == found[5] == RATE
    assert min(found) > 0


def test_the_cosine_ends_at_the_minimum_and_constant_stays():
    options = Optimizer(learning_rate=RATE, warmup=0.0, minimum=0.1)
    assert learning_rate(options, Clock(step=10, total_steps=10)) == pytest.approx(0.1 * RATE)
    assert learning_rate(options, Clock(step=5, total_steps=10)) == pytest.approx(0.55 * RATE)
    assert rates(4, warmup=0.5, schedule="constant") == pytest.approx([RATE / 3, 2 * RATE / 3, RATE, RATE])


def test_the_rate_counts_applied_updates_only():
    options = Optimizer()
    assert learning_rate(options, Clock(step=3, total_steps=9, consumed=64, skipped=5)) == learning_rate(
        options, Clock(step=3, total_steps=9)
    )


# --- on ranks --------------------------------------------------------------------------------------


def student_of(config, options, *, expert=1, precision="fp32", router_bias_rate=0.0):
    layout = Layout(expert=expert)
    chosen = ModelOptions(
        device=CPU,
        layout=layout,
        precision=Precision(precision),
        trainable=True,
        router_bias_rate=router_bias_rate,
    )
    model = build_model(architecture(config), make_groups(layout), chosen)
    draw_weights(model, 1)
    return Student(model, Context(kind="bidirectional"), 0, Optimizer(**options))


def weights_of(student):
    return {name: weight.detach().clone() for name, weight in student.model.named_parameters()}


def push(student, factor, *, finite=True, step=0):
    """Attempt one update in which every weight has the gradient `factor` on this rank."""
    student.clear()
    student.release(sum((weight * factor).sum() for weight in student.model.parameters()))
    return student.update(Clock(step=step, total_steps=100), finite=finite)


def sgd_step(config, expert, clip, factor):
    """Return (norm, wanted norm, largest error of the weights, the rate), on this rank."""
    student = student_of(config, {**SGD, "clip_norm": clip}, expert=expert)
    before = weights_of(student)
    result = push(student, factor)
    world = dist.get_world_size()
    squares = torch.zeros((), dtype=torch.float64)
    gradient = {}
    for name, weight in student.model.named_parameters():
        is_mine = ".local_experts." in name
        # Dense weights are on every rank and their gradients add up; an expert over all ranks is on one.
        gradient[name] = factor if is_mine else factor * world
        squares += weight.numel() * gradient[name] ** 2 / (1 if is_mine else world)
    wanted = float(sum_over(squares)) ** 0.5
    scale = 1.0 if clip is None else min(1.0, clip / wanted)
    after = weights_of(student)
    errors = [
        (before[name] - RATE * scale * gradient[name] - after[name]).abs().max() / (RATE * scale * factor)
        for name in before
    ]
    return result.grad_norm, wanted, float(max(errors)), result.learning_rate


@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
@pytest.mark.parametrize(("ranks", "config", "expert"), [(1, DENSE, 1), (2, DENSE, 1), (2, MIXTURE, 2)])
def test_norm_and_clipping_cover_all_weights_of_all_ranks(pool, ranks, config, expert, clip):
    for norm, wanted, error, rate in pool(ranks).run(sgd_step, config, expert, clip, 3.0):
        assert norm == pytest.approx(wanted, rel=1e-6)
        assert error < 1e-3
        assert rate == RATE


def adamw_decay(distributed):
    """Return, by weight, how much more a decayed update moved it than one without decay."""
    moved = {}
    for decay in (0.0, 0.5):
        student = student_of(DENSE, {**ADAMW, "weight_decay": decay, "distributed": distributed})
        before = weights_of(student)
        push(student, 2.0)
        after = weights_of(student)
        moved[decay] = {name: before[name] - after[name] for name in before}
    extra = {name: moved[0.5][name] - moved[0.0][name] for name in before}
    error = {
        name: float(
            (extra[name] - (0.01 * 0.5 * before[name] if before[name].dim() > 1 else 0.0)).abs().max()
        )
        for name in before
    }
    return error, float(max((value - 0.01).abs().max() for value in moved[0.0].values()))


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_adamw_moves_by_the_rate_and_decays_matrices_only(pool, ranks, distributed):
    for error, first_move in pool(ranks).run(adamw_decay, distributed):
        assert first_move < 1e-4  # Adam's first update is the rate, whatever the gradient's size
        assert max(error.values()) < 1e-5, error
        assert any("norm" in name for name in error)  # they have one axis


def skipped_updates(options, kind):
    """Do one good update, one that rank 1 spoils, one good one; beside it the two good ones alone."""
    student, twin = student_of(DENSE, options), student_of(DENSE, options)
    is_bad = dist.get_rank() == dist.get_world_size() - 1
    push(student, 1.0)
    before = weights_of(student)
    factor = float("nan" if kind == "nan" else "inf") if is_bad and kind != "objective" else 1.0
    spoilt = push(student, factor, finite=not (is_bad and kind == "objective"), step=1)
    unchanged = all(torch.equal(before[name], weight) for name, weight in weights_of(student).items())
    good = push(student, 2.0, step=1)
    push(twin, 1.0)
    push(twin, 2.0, step=1)
    apart = max(
        float((weight - weights_of(twin)[name]).abs().max()) for name, weight in weights_of(student).items()
    )
    return spoilt.applied, unchanged, good.applied, apart, math.isfinite(spoilt.grad_norm)


@pytest.mark.parametrize("kind", ["nan", "inf", "objective"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_update_that_one_rank_spoils_is_skipped_on_all_and_leaves_no_trace(pool, name, kind):
    options = {"sgd": SGD, "adamw": ADAMW}[name]
    for applied, unchanged, good, apart, finite in pool(2).run(skipped_updates, options, kind):
        assert not applied
        assert unchanged
        assert good
        assert apart == 0.0
        assert finite == (kind == "objective")


def small_updates(options):
    student = student_of(DENSE, options, precision="bf16")
    for step in range(16):
        push(student, 1.0, step=step)
    return float(student.model.decoder.final_layernorm.weight.detach().float().mean())


@pytest.mark.parametrize("distributed", [True, False])
def test_bf16_weights_have_masters_that_keep_updates_below_their_resolution(pool, distributed):
    options = {**ADAMW, "learning_rate": 0.001, "distributed": distributed}
    (value,) = pool(1).run(small_updates, options)
    assert value == pytest.approx(1 - 0.016, abs=0.004)  # one update is a quarter of bf16's step below 1


def moved_router_biases(finite):
    """Return how far an attempted update moved the router biases when expert 0 had all the tokens."""
    student = student_of(MIXTURE, SGD, router_bias_rate=0.125)
    buffers = dict(student.model.named_buffers())
    biases = [name for name in buffers if name.endswith("expert_bias")]
    before = [buffers[name].clone() for name in biases]
    for name in biases:
        buffers[name.replace("expert_bias", "local_tokens_per_expert")][0] = 100
    push(student, 1.0, finite=finite)
    return [float((buffers[name] - old).abs().max()) for name, old in zip(biases, before, strict=True)]


def test_a_skipped_update_leaves_the_router_biases_where_they_were(pool):
    assert pool(1).run(moved_router_biases, True)[0] == pytest.approx([0.125, 0.125])
    assert pool(1).run(moved_router_biases, False)[0] == [0.0, 0.0]
