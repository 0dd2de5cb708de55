"""What the fused head loss promises beside its values: evaluation, the factor 1, budgets, rows that fit."""

import dataclasses
import shutil

import pytest
import torch

from tests.parallel.vocabulary_cases import CASES, CLOCK, counts_of, heads_of, hidden_of, losses_of, noised_of
from tests.unit.head.calls import evaluate
from tide_megatron.base.errors import ConfigError, TideError
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss
from tide_megatron.losses.kl import Kl
from tide_megatron.losses.rows import rows_of

CASE = CASES["one vocabulary"]


@pytest.fixture
def given():
    """Return the arguments of a head loss over all losses, with a buffer for the gradient."""
    noised = noised_of(CASE, 1, 2)
    heads, hidden = heads_of(CASE), hidden_of(CASE, noised, 1)
    student = HeadInput(
        hidden=hidden["student"].requires_grad_(),
        weight=heads["student"],
        gradient=torch.zeros_like(heads["student"]),
    )
    answers = {name: HeadInput(hidden=hidden[name], weight=heads[name]) for name in ("same", "other")}
    losses = losses_of("all", CASE)
    return [student, answers, losses, rows_of(noised), counts_of(losses, [noised]), CLOCK]


def test_evaluation_writes_nothing(given):
    student = given[0]
    wanted = evaluate(*given, form="plain")
    quiet = dataclasses.replace(student, hidden=student.hidden.detach(), gradient=None)
    found = evaluate(quiet, *given[1:])
    assert not found.objective.requires_grad
    torch.testing.assert_close(found.objective, wanted.objective.detach())
    for name, value in wanted.sums.items():
        torch.testing.assert_close(found.sums[name], value, rtol=1e-5, atol=1e-7)


def test_the_weights_gradient_is_added_to_what_is_there(given):
    student = given[0]
    evaluate(*given)
    once = student.gradient.clone()
    evaluate(*given)
    torch.testing.assert_close(student.gradient, 2 * once)


def test_the_objective_may_not_be_scaled(given):
    found = evaluate(*given)
    with pytest.raises(RuntimeError, match="scaled after it was computed"):
        (2 * found.objective).backward()


def test_no_term_gives_zero_with_a_graph(given):
    student = given[0]
    counts = {name: torch.tensor(0.0) for name in given[2]}
    found = evaluate(*given[:4], counts, CLOCK)
    found.objective.backward()
    assert found.sums == {}
    assert not student.hidden.grad.any()
    assert not student.gradient.any()


def test_a_budget_below_one_row_is_refused(given):
    with pytest.raises(
        ConfigError, match=r"^head\.budget_mib: 1 MiB do not hold .* use at least 10, or more head\.ranks"
    ):
        evaluate(*given, budget_mib=1)


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_rows_that_do_not_belong_together_are_refused(given, form):
    student, answers, *rest = given
    short = answers | {"other": dataclasses.replace(answers["other"], hidden=answers["other"].hidden[1:])}
    with pytest.raises(
        TideError, match=r"^teachers\.other: \d+ hidden rows where the microbatch's rows are \d+; make"
    ):
        evaluate(student, short, *rest, form=form)
    with pytest.raises(TideError, match=r"^the student: 3 hidden rows where"):
        evaluate(dataclasses.replace(student, hidden=student.hidden[:3]), answers, *rest, form=form)
    with pytest.raises(TideError, match=r"^teachers\.same: a loss listens to it, but it gave no answer"):
        evaluate(student, {"other": answers["other"]}, *rest, form=form)


def test_a_second_call_finds_buffers_and_gives_the_same(given):
    student, answers, losses, rows, counts, clock = given
    head = HeadLoss(losses)
    rows = GatheredRows.alone(rows, {name: float(count) for name, count in counts.items()})
    first, second = (head(student, answers, rows, clock) for _ in range(2))
    assert {name: float(value) for name, value in first.sums.items()} == {
        name: float(value) for name, value in second.sums.items()
    }


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_no_temperature_but_a_positive_one(temperature):
    with pytest.raises(ValueError, match="temperature"):
        Kl(teacher="t", temperature=temperature)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiled_is_eager(given):
    student = given[0]
    names = ("cross_entropy", "tidal other", "jensen_shannon same", "reverse_kl same", "reverse_calm other")
    given[2] = {name: given[2][name] for name in names}
    given[4] = {name: given[4][name] for name in names}
    eager = evaluate(*given)
    wanted = student.gradient.clone()
    student.gradient.zero_()
    compiled = evaluate(*given, compiled=True)
    torch.testing.assert_close(student.gradient, wanted, rtol=1e-5, atol=1e-6)
    for name, value in eager.sums.items():
        torch.testing.assert_close(compiled.sums[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["weights", "fp32"])
def test_bf16_heads_are_the_plain_form_in_the_same_products(given, precision):
    student, answers, *rest = given
    half = {"hidden": torch.Tensor.bfloat16, "weight": torch.Tensor.bfloat16}
    answers = {
        name: dataclasses.replace(head, **{key: cast(getattr(head, key)) for key, cast in half.items()})
        for name, head in answers.items()
    }
    hidden = student.hidden.detach().bfloat16().requires_grad_()
    weight = student.weight.bfloat16().requires_grad_()
    by_autograd = dataclasses.replace(student, hidden=hidden, weight=weight)
    plain = evaluate(by_autograd, answers, *rest, form="plain", precision=precision)
    plain.objective.backward()
    again = hidden.detach().requires_grad_()
    fused = evaluate(
        dataclasses.replace(student, hidden=again, weight=weight.detach()),
        answers,
        *rest,
        precision=precision,
    )
    fused.objective.backward()
    for name, value in plain.sums.items():
        torch.testing.assert_close(fused.sums[name], value, rtol=1e-4, atol=1e-5)
    tolerance = 2e-2 * float(hidden.grad.float().abs().max())  # two roundings to bf16
    torch.testing.assert_close(again.grad.float(), hidden.grad.float(), rtol=0, atol=tolerance)
    tolerance = 2e-2 * float(weight.grad.float().abs().max())
    torch.testing.assert_close(student.gradient, weight.grad.float(), rtol=0, atol=tolerance)


def test_exact_products_differ_from_bf16_ones(given):
    student, answers, *rest = given
    hidden, weight = student.hidden.detach().bfloat16() * 1.01, student.weight.bfloat16()
    rough = dataclasses.replace(student, hidden=hidden, weight=weight, gradient=None)
    first, second = (evaluate(rough, answers, *rest, precision=name).sums for name in ("weights", "fp32"))
    assert any(float(first[name]) != float(second[name]) for name in first)
