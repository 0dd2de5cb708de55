"""Losses over chunks and pairs of two tokenizers, each written out chunk by chunk in plain numbers."""

import math

import pytest
import torch

from goldens.dense import loss_values
from tests.unit.diffusion.sides import chunks_of, random_batch
from tests.unit.losses.pairs import has_teacher
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.losses import LOSSES
from tide_megatron.losses.calm import Calm, CalmTidal, ReverseCalm, ReverseCalmTidal
from tide_megatron.losses.kl import Kl, ReverseKl
from tide_megatron.losses.rows import rows_of
from tide_megatron.losses.tidal import Tidal

CLOCK = Clock(step=30, total_steps=100)
TEMPERATURE = 3.0
CHUNK_LOSSES = (Calm, ReverseCalm, CalmTidal, ReverseCalmTidal)
MOST = 1 - 1e-7


def case(seed, time=None, vocabularies=(40, 45), samples=3):
    """Return a noised batch with a side, student logits with gradient, teacher logits."""
    batch = random_batch(seed, samples=samples)
    noiser = Noiser(seed=seed)
    noised = noiser(batch) if time is None else noiser.at(batch, time)
    generator = torch.Generator().manual_seed(seed)
    sizes = (int(noised.masked.sum()), int(noised.reading("t0").targets.sum()))
    student, teacher = (
        torch.randn(rows, width, generator=generator) for rows, width in zip(sizes, vocabularies, strict=True)
    )
    return noised, student.requires_grad_(True), teacher


def row_of(chosen, sample, position):
    return int(chosen.flatten()[: sample * chosen.shape[1] + position].sum())


def likelihoods_by_hand(noised, student, teacher):
    """Yield (noise level, student's and teacher's log-likelihood) of each wholly masked chunk."""
    side, asked = noised.batch.sides["t0"], noised.reading("t0").targets
    logs = [logits.detach().double().log_softmax(-1) for logits in (student, teacher)]
    for sample, mine, theirs in chunks_of(side):
        if not bool(noised.masked[sample, mine].all()):
            continue
        ours = sum(
            logs[0][row_of(noised.masked, sample, p), noised.batch.ids[sample, p]].item() for p in mine
        )
        other = sum(logs[1][row_of(asked, sample, p), side.ids[sample, p]].item() for p in theirs)
        yield float(noised.time[sample]), ours, other


def value_by_hand(kind, time, ours, theirs, loss):
    s, t = (min(max(math.exp(log / TEMPERATURE), 1e-7), MOST) for log in (ours, theirs))
    if kind in (CalmTidal, ReverseCalmTidal):
        share = (0.1 + 0.8 * (1 - math.cos(math.pi * 0.3)) / 2) * (1 - time)
        t = min(max((1 - share) * s + share * t, 1e-7), MOST)
    if kind in (Calm, CalmTidal):
        return -(t * math.log(s) + (1 - t) * math.log(1 - s))
    return -(s * math.log(t) + (1 - s) * math.log(1 - t))


@pytest.mark.parametrize("kind", CHUNK_LOSSES)
@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_every_wholly_hidden_chunk(kind, seed):
    noised, student, teacher = case(seed, 0.8)
    loss = kind(teacher="t0", temperature=TEMPERATURE)
    chunks = list(likelihoods_by_hand(noised, student, teacher))
    assert loss.count(noised) == len(chunks) > 3
    values = loss_values(loss, student, teacher, rows_of(noised), CLOCK)
    wanted = [value_by_hand(kind, *chunk, loss) for chunk in chunks]
    assert values.tolist() == pytest.approx(wanted, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("kind", CHUNK_LOSSES)
def test_gradients_are_the_closed_form(kind):
    """Logits get c (onehot - p): c = -(m - s) / ((1 - s) T) forward, -(s / T) log(m / (1 - m)) in reverse."""
    noised, student, teacher = case(5, 0.9)
    loss = kind(teacher="t0", temperature=TEMPERATURE)
    rows = rows_of(noised)
    loss_values(loss, student, teacher, rows, CLOCK).sum().backward()
    link = noised.link("t0")
    target, coefficient = [], []
    for time, ours, theirs in likelihoods_by_hand(noised, student, teacher):
        s, t = math.exp(ours / TEMPERATURE), math.exp(theirs / TEMPERATURE)
        if "Tidal" in kind.__name__:
            share = float(loss.teacher_share(torch.tensor(time), CLOCK))
            t = (1 - share) * s + share * t
        target.append(t)
        forward = -(t - s) / ((1 - s) * TEMPERATURE)
        coefficient.append(
            forward if kind in (Calm, CalmTidal) else -(s / TEMPERATURE) * math.log(t / (1 - t))
        )
    wanted = torch.zeros_like(student)
    probability = student.detach().softmax(-1)
    for row, chunk in zip(*(members.tolist() for members in link.student_rows), strict=True):
        onehot = torch.nn.functional.one_hot(rows.gold[row], student.shape[1])
        wanted[row] += coefficient[chunk] * (onehot - probability[row])
    torch.testing.assert_close(student.grad, wanted, rtol=1e-4, atol=1e-7)


def test_timestep_weights_of_a_mixture_are_those_of_the_chunks_samples():
    noised, _, _ = case(2)
    loss = CalmTidal(teacher="t0", timestep_weight="midrange")
    times = noised.time[noised.link("t0").chunk_sample]
    assert len(set(times.tolist())) > 1
    wanted = torch.exp(-((times - 0.5) ** 2) / (2 * 0.15**2))
    torch.testing.assert_close(loss.coefficients(rows_of(noised), CLOCK), wanted)


@pytest.mark.parametrize("kind", [Kl, ReverseKl, Tidal])
def test_losses_by_id_compare_the_pairs_and_nothing_else(kind):
    noised, student, teacher = case(3, 1.0, (40, 40), samples=16)
    side = noised.batch.sides["t0"]
    for sample, mine, theirs in chunks_of(side):  # make every second chunk of one token a pair
        if len(mine) == len(theirs) == 1 and (sample + mine[0]) % 2:
            side.ids[sample, theirs[0]] = noised.batch.ids[sample, mine[0]]
    loss, rows = kind(teacher="t0"), rows_of(noised)
    link = noised.link("t0")
    assert loss.count(noised) == link.num_pairs > 2
    found = loss_values(loss, student, teacher, rows, CLOCK)
    mine, theirs = link.pairs
    for number, (row, other) in enumerate(zip(mine.tolist(), theirs.tolist(), strict=True)):
        alone = type(rows)(
            gold=rows.gold[row : row + 1],
            sample=rows.sample[row : row + 1],
            time=rows.time,
            maskable=rows.maskable,
        )
        (value,) = loss_values(
            kind(teacher="x"), student[row : row + 1], teacher[other : other + 1], alone, CLOCK
        )
        torch.testing.assert_close(found[number], value)
    found.sum().backward()
    touched = student.grad.abs().sum(-1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) <= set(mine.tolist())


@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if has_teacher(kind)])
def test_nothing_aligned_is_nothing_to_count(name):
    noised, student, teacher = case(1, 0.0)
    loss = LOSSES[name](teacher="t0")
    assert loss.count(noised) == 0
    assert loss_values(loss, student, teacher[:, :40], rows_of(noised), CLOCK).shape == (0,)
