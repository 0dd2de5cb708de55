"""The plain head loss against a dense computation over all positions, values and gradients.

The dense side is written here from the formulas, in fp64: logits [samples, length, vocabulary] of every
position, sums over masks, no picked rows and no code of the package.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.head.calls import evaluate
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import IGNORED, Batch, Noised
from tide_megatron.head.inputs import HeadInput
from tide_megatron.losses.calm import Calm, ReverseCalm
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.kl import Kl, ReverseKl
from tide_megatron.losses.rows import rows_of
from tide_megatron.losses.tidal import Tidal

CLOCK = Clock(step=3, total_steps=8)


@dataclasses.dataclass(kw_only=True)
class Case:
    """A noised microbatch with full hidden states of a student and two teachers."""

    noised: Noised
    student: tuple[torch.Tensor, torch.Tensor]
    """([samples, length, hidden], [vocabulary, hidden]) with gradient."""
    teachers: dict[str, tuple[torch.Tensor, torch.Tensor]]


def case_of(samples=2, length=6, vocabulary=11, seed=0, hidden_share=0.5):
    """Draw a case; the big teacher has more ids and another width."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    ids = torch.randint(vocabulary, (samples, length), generator=generator)
    labels = ids.masked_fill(torch.rand(samples, length, generator=generator) < 0.3, IGNORED)
    hidden = (torch.rand(samples, length, generator=generator) < hidden_share) & (labels != IGNORED)
    numbers = torch.arange(samples)
    batch = Batch(sample_ids=numbers, epochs=numbers * 0, ids=ids, labels=labels, reply_bytes=numbers)
    time = 0.1 + 0.9 * torch.rand(samples, generator=generator)
    return Case(
        noised=Noised(batch=batch, time=time, masked=hidden),
        student=(draw(samples, length, 4).requires_grad_(True), draw(vocabulary, 4).requires_grad_(True)),
        teachers={
            "same": (draw(samples, length, 5), draw(vocabulary, 5)),
            "big": (draw(samples, length, 3), draw(vocabulary + 3, 3)),
        },
    )


def terms(vocabulary):
    """Every formula at once, over two teachers, all with different options and weights."""
    return {
        "ce": CrossEntropy(weight=1.0),
        "twin": CrossEntropy(weight=0.5, timestep_weight="uniform", normalization="hidden"),
        "per_sample": CrossEntropy(weight=0.25, normalization="sequence"),
        "kl": Kl(teacher="same", weight=4.0, temperature=2.0),
        "reverse": ReverseKl(teacher="big", weight=0.5, temperature=1.5, shared_vocab_size=vocabulary - 1),
        "tidal": Tidal(teacher="big", weight=0.7, shared_vocab_size=vocabulary, timestep_weight="midrange"),
        "calm": Calm(teacher="same", weight=0.3, temperature=5.0),
        "reverse_calm": ReverseCalm(teacher="big", weight=0.2),
    }


def picked(case, names=None):
    """Run the plain head loss on the case's hidden rows with this microbatch's own counts."""
    losses = {
        name: loss for name, loss in terms(len(case.student[1])).items() if names is None or name in names
    }
    index = case.noised.row_index
    return evaluate(
        HeadInput(hidden=case.student[0][index], weight=case.student[1]),
        {
            name: HeadInput(hidden=hidden[index], weight=head)
            for name, (hidden, head) in case.teachers.items()
        },
        losses,
        rows_of(case.noised),
        {name: loss.count(case.noised) for name, loss in losses.items()},
        CLOCK,
        form="plain",
    )


def dense(case):
    """Return every term of `terms` from full logits in fp64, as {name: mean}, written from the spec."""
    batch, mask = case.noised.batch, case.noised.masked.double()
    student = case.student[0].double() @ case.student[1].double().T  # [samples, length, vocabulary]
    logits = {name: hidden.double() @ head.double().T for name, (hidden, head) in case.teachers.items()}
    time = case.noised.time.double()[:, None]
    maskable, hidden = (batch.labels != IGNORED).double(), max(1.0, mask.sum().item())
    gold = batch.ids[..., None]
    nll = -student.log_softmax(-1).gather(-1, gold)[..., 0]
    weighted = nll * mask / (time + 1e-6)
    vocabulary = student.shape[-1]

    def soft(values, temperature, columns):
        return (values[..., :columns] / temperature).log_softmax(-1)

    s, t = soft(student, 2.0, vocabulary), soft(logits["same"], 2.0, vocabulary)
    kl = 4.0 * (t.exp() * (t - s)).sum(-1)
    s, t = soft(student, 1.5, vocabulary - 1), soft(logits["big"], 1.5, vocabulary - 1)
    reverse = 2.25 * (s.exp() * (s - t)).sum(-1)
    trained = 0.1 + 0.8 * 0.5 * (1 - math.cos(math.pi * 3 / 8))
    share = (trained * (1 - time))[..., None]
    mixed = ((1 - share) * student / 2 + share * logits["big"][..., :vocabulary] / 2).detach().softmax(-1)
    s = soft(student, 2.0, vocabulary)
    tidal = 4.0 * (mixed * (mixed.clamp_min(1e-8).log() - s)).sum(-1)
    tidal = tidal * torch.exp(-((time - 0.5) ** 2) / 0.045)

    def likelihood(values, temperature):
        gold_values = values.log_softmax(-1).gather(-1, gold)[..., 0]
        return (gold_values / temperature).exp().clamp(1e-7, 1 - 1e-7)

    s, t = likelihood(student, 5.0), likelihood(logits["same"], 5.0)
    calm = -(t * s.log() + (1 - t) * (1 - s).log())
    s, t = likelihood(student, 2.0), likelihood(logits["big"], 2.0)
    reverse_calm = -(s * t.log() + (1 - s) * (1 - t).log())
    by_sample = weighted.sum(-1) / maskable.sum(-1).clamp_min(1)
    means = {
        "ce": weighted.sum() / maskable.sum().clamp_min(1),
        "twin": (nll * mask).sum() / hidden,
        "per_sample": by_sample.mean(),
    }
    rest = {"kl": kl, "reverse": reverse, "tidal": tidal, "calm": calm, "reverse_calm": reverse_calm}
    return means | {name: (values * mask).sum() / hidden for name, values in rest.items()}


def gradients(case, objective):
    """Backpropagate and return (hidden gradient, head gradient), with the leaves cleared again."""
    objective.backward()
    found = [leaf.grad.clone() for leaf in case.student]
    for leaf in case.student:
        leaf.grad = None
    return found


def relative(ours, truth):
    """Largest error over the larger of 1 and the largest true value."""
    truth = truth.detach().double()
    if truth.numel() == 0:
        return 0.0
    return ((ours.detach().double() - truth).abs().max() / truth.abs().max().clamp_min(1)).item()


def check(case):
    """Compare everything: sums, objective, gradients to hidden rows and to the head."""
    parts, means = picked(case), dense(case)
    losses = terms(len(case.student[1]))
    present = [name for name, loss in losses.items() if loss.count(case.noised) > 0]
    assert list(parts.sums) == present
    for name in present:
        assert relative(parts.sums[name], means[name]) <= 1e-6, name
    total = sum((losses[name].weight * means[name] for name in present), case.student[0].double().sum() * 0)
    weights = sum(abs(losses[name].weight) for name in present)
    assert relative(parts.objective, total) <= 1e-6 * max(1, weights), "each loss brings its own rounding"
    ours, truth = (
        gradients(case, parts.objective),
        gradients(case, total + case.student[1].double().sum() * 0),
    )
    assert relative(ours[0], truth[0]) <= 1e-6
    assert relative(ours[1], truth[1]) <= 1e-6


def test_all_losses_and_teachers_together_equal_the_dense_computation():
    check(case_of(samples=3, length=8))


@pytest.mark.parametrize("name", terms(11))
def test_each_term_alone_equals_the_dense_computation(name):
    """One by one, so that a large term cannot hide a small one; errors are relative to the term's own
    gradient.
    """
    case = case_of(samples=3, length=8, seed=5)
    parts, mean = picked(case, [name]), dense(case)[name]
    weight = terms(11)[name].weight
    assert parts.sums[name].item() == pytest.approx(mean.item(), rel=2e-6)
    assert parts.objective.item() == pytest.approx(weight * mean.item(), rel=2e-6)
    ours, truth = gradients(case, parts.objective), gradients(case, weight * mean)
    for found, expected in zip(ours, truth, strict=True):
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 3),
    length=st.integers(1, 6),
    vocabulary=st.integers(2, 12),
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_small_shapes_equal_the_dense_computation(samples, length, vocabulary, seed, share):
    check(case_of(samples, length, vocabulary, seed, share))


def test_nothing_hidden_gives_zero_with_a_graph():
    case = case_of(hidden_share=0.0)
    parts = picked(case, ["kl", "calm", "twin"])
    assert parts.sums == {}
    assert parts.objective.item() == 0.0
    for grad in gradients(case, parts.objective):
        assert (grad == 0).all()


def test_a_rank_without_rows_still_contributes_zero_to_the_sums():
    """Other ranks have rows, so the count is not 0: the term is present here too, with value 0."""
    case = case_of(hidden_share=0.0)
    index = case.noised.row_index
    parts = evaluate(
        HeadInput(hidden=case.student[0][index], weight=case.student[1]),
        {"same": HeadInput(hidden=case.teachers["same"][0][index], weight=case.teachers["same"][1])},
        {"kl": Kl(teacher="same")},
        rows_of(case.noised),
        {"kl": torch.tensor(7.0, dtype=torch.float64)},
        CLOCK,
        form="plain",
    )
    assert parts.sums["kl"].item() == 0.0
    assert all((grad == 0).all() for grad in gradients(case, parts.objective))


def test_microbatches_add_up_to_the_whole():
    """Two samples at once, or one after the other under the SAME counts: equal objective and gradients."""
    case = case_of(samples=2, length=8, seed=3)
    losses = terms(11)
    counts = {name: loss.count(case.noised) for name, loss in losses.items()}

    def part(chosen):
        batch = case.noised.batch
        names = [field.name for field in dataclasses.fields(batch) if field.name not in ("sides", "taught")]
        fields = {name: getattr(batch, name)[chosen] for name in names}
        noised = Noised(
            batch=Batch(**fields), time=case.noised.time[chosen], masked=case.noised.masked[chosen]
        )
        index = noised.row_index
        answers = {
            name: HeadInput(hidden=hidden[chosen][index], weight=head)
            for name, (hidden, head) in case.teachers.items()
        }
        mine = HeadInput(hidden=case.student[0][chosen][index], weight=case.student[1])
        return evaluate(mine, answers, losses, rows_of(noised), counts, CLOCK, form="plain")

    whole = part(slice(0, 2))
    pieces = [part(slice(0, 1)), part(slice(1, 2))]
    torch.testing.assert_close(pieces[0].objective + pieces[1].objective, whole.objective)
    for name in losses:
        assert (pieces[0].sums[name] + pieces[1].sums[name]).item() == pytest.approx(whole.sums[name].item())
    expected = gradients(case, whole.objective)
    found = gradients(case, pieces[0].objective + pieces[1].objective)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_the_count_divides_and_the_weight_multiplies_once():
    case = case_of()
    index = case.noised.row_index
    mine = HeadInput(hidden=case.student[0][index], weight=case.student[1])
    rows = rows_of(case.noised)

    def objective(weight, count):
        loss = CrossEntropy(weight=weight)
        return evaluate(mine, {}, {"ce": loss}, rows, {"ce": count}, CLOCK, form="plain")

    base = objective(1.0, 8.0)
    assert objective(3.0, 8.0).objective.item() == pytest.approx(3 * base.objective.item())
    assert objective(1.0, 4.0).objective.item() == pytest.approx(2 * base.objective.item())
    assert objective(3.0, 8.0).sums["ce"].item() == pytest.approx(base.sums["ce"].item())
    assert objective(1.0, 4.0).sums["ce"].item() == pytest.approx(2 * base.sums["ce"].item())


def test_no_gradient_reaches_a_teacher():
    case = case_of()
    hidden, head = (side.clone().requires_grad_(True) for side in case.teachers["same"])
    case.teachers["same"] = (hidden, head)
    picked(case).objective.backward()
    assert hidden.grad is None
    assert head.grad is None


def test_sums_are_detached_fp64_and_the_objective_is_fp32():
    parts = picked(case_of())
    assert parts.objective.dtype == torch.float32
    assert parts.objective.shape == ()
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in parts.sums.values())


def test_bf16_heads_give_fp32_logits():
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4).bfloat16()
    logits = HeadInput(hidden=hidden, weight=weight).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.bfloat16() @ weight.T, check_dtype=False)
