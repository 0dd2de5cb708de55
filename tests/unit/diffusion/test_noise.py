"""Noise: known answers by Python integers, statistics, and independence from everything but its key."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from pydantic import ValidationError

from tide_megatron.diffusion.batch import IGNORED, Batch
from tide_megatron.diffusion.noise import NoiseOptions, Noiser, stream_word, uniforms
from tide_megatron.diffusion.schedule import SCHEDULES

MASK64 = (1 << 64) - 1
PINNED = [0.26117444038391113, 0.9836151599884033, 0.27554720640182495, 0.7237974405288696]


def by_hand(seed: int, epoch: int, sample: int, stream: str, index: int) -> float:
    """Hash with unbounded Python integers, reduced by hand; no tensor anywhere."""
    name = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    state = 0
    for word in (seed, name, epoch, sample, index):
        state = ((state ^ (word & MASK64)) + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return (state >> 40) / 2**24


def draw(seed=7, epoch=0, sample=0, stream="hide", index=0):
    """Draw with scalars or tensors."""
    values = [torch.as_tensor(value, dtype=torch.int64) for value in (epoch, sample, index)]
    return uniforms(seed, values[0], values[1], stream, values[2])


def batch_of(sample_ids, length=64, epoch=0, prompt=0, padding=0):
    """Make a batch whose tokens are their positions; `prompt` first and `padding` last may not hide."""
    sample_ids = torch.tensor(sample_ids)
    ids = torch.arange(length).repeat(len(sample_ids), 1)
    labels = ids.clone()
    labels[:, :prompt] = IGNORED
    labels[:, length - padding :] = IGNORED
    return Batch(
        sample_ids=sample_ids,
        epochs=torch.full_like(sample_ids, epoch),
        ids=ids,
        labels=labels,
        reply_bytes=torch.ones_like(sample_ids),
    )


@pytest.mark.parametrize(
    "key",
    [
        (0, 0, 0, "time", 0),
        (42, 0, 1, "hide", 0),
        (42, 3, 123_456_789, "hide", 4095),
        (2**63 - 1, 1, 2**62, "split", 1),
        (-1, 0, 5, "time", 0),
    ],
)
def test_known_answers(key):
    assert draw(*key).item() == by_hand(*key)


def test_pinned_values():
    """These numbers must never change: resumed runs and recorded figures depend on them."""
    pinned = [draw(42, 1, sample, "hide", sample + 2).item() for sample in range(4)]
    assert pinned == PINNED


def test_uniforms_lie_on_the_24_bit_grid_below_one():
    values = draw(index=torch.arange(100_000))
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    scaled = values.double() * 2**24
    assert torch.equal(scaled, scaled.round())
    assert scaled.remainder(2).mean().item() == pytest.approx(0.5, abs=0.01)  # the last bit is used


def neighbours(axis: str, count: int) -> torch.Tensor:
    """Draw along one argument, the others fixed."""
    line = torch.arange(count)
    if axis == "stream":
        return torch.stack([draw(stream=f"stream {number}") for number in range(count)])
    if axis == "seed":
        return torch.stack([draw(seed=number) for number in range(count)])
    return draw(**{axis: line})


@pytest.mark.parametrize(
    ("axis", "count"),
    [("index", 200_000), ("sample", 200_000), ("epoch", 200_000), ("seed", 4000), ("stream", 4000)],
)
def test_statistics_along_every_argument(axis, count):
    """Mean, variance, correlation of neighbours and balance of the eight top bits, within five deviations."""
    values = neighbours(axis, count).double()
    deviations = 5 / count**0.5
    assert abs(values.mean() - 0.5) < deviations * (1 / 12) ** 0.5
    assert abs(values.var() - 1 / 12) < deviations * (1 / 180) ** 0.5
    centred = values - 0.5
    for lag in (1, 2, 3, 8, 64):
        assert abs((centred[lag:] * centred[:-lag]).mean() * 12) < 5 / (count - lag) ** 0.5, lag
    for bit in range(8):
        share = (values * 2 ** (bit + 1)).long().remainder(2).double().mean()
        assert abs(share - 0.5) < deviations * 0.5, bit


@pytest.mark.parametrize("other", [{"epoch": 1}, {"sample": 1}, {"seed": 8}, {"stream": "time"}])
def test_whole_rows_of_neighbouring_keys_are_unrelated(other):
    index = torch.arange(100_000)
    one, two = draw(index=index), draw(index=index, **other)
    correlation = torch.corrcoef(torch.stack([one, two]).double())[0, 1]
    assert abs(correlation) < 5 / len(index) ** 0.5
    assert (one == two).double().mean() < 1e-4


def test_epoch_and_sample_do_not_trade_places():
    assert draw(epoch=3, sample=5) != draw(epoch=5, sample=3)
    assert draw(sample=3, index=5) != draw(sample=5, index=3)


def test_stream_names_have_their_own_words():
    words = [stream_word(name) for name in ("time", "hide", "split", "hide@0.1", "")]
    assert len(set(words)) == len(words)


def test_what_is_hidden_depends_on_the_sample_alone():
    """Same tokens hidden whatever the batch, its order and its padded length."""
    noiser = Noiser(seed=1)
    whole = noiser(batch_of([5, 6, 7, 8]))
    for order in ([8, 5], [7], [6, 8, 5]):
        part = noiser(batch_of(order, length=48))
        for place, sample in enumerate(order):
            assert part.time[place] == whole.time[sample - 5]
            assert torch.equal(part.masked[place], whole.masked[sample - 5, :48])


def test_noise_uses_no_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = Noiser(seed=1)(batch_of([1, 2]))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(one.masked, Noiser(seed=1)(batch_of([1, 2])).masked)


@pytest.mark.parametrize(("seed", "epoch"), [(2, 0), (1, 1)])
def test_seed_and_epoch_change_times_and_hidden_sets(seed, epoch):
    one, two = Noiser(seed=1)(batch_of(range(32))), Noiser(seed=seed)(batch_of(range(32), epoch=epoch))
    assert (one.time != two.time).all()
    assert not torch.equal(one.masked, two.masked)
    one, two = (
        Noiser(seed=1).at(batch_of(range(32)), 0.5),
        Noiser(seed=seed).at(batch_of(range(32), epoch=epoch), 0.5),
    )
    assert 0.4 < (one.masked != two.masked).double().mean() < 0.6  # two fair coins


def test_time_and_hiding_draw_from_different_streams():
    """The first position's draw must not be the time's draw, or short samples would be biased."""
    noised = Noiser(seed=1, options=NoiseOptions(time_epsilon=0.0))(batch_of(range(4000), length=1))
    correlation = torch.corrcoef(torch.stack([noised.time, noised.masked[:, 0].float()]))[0, 1]
    assert correlation == pytest.approx(0.577, abs=0.05)  # sqrt(1/3), what independent draws give


def test_injected_uniforms_give_the_formula():
    batch = batch_of([0, 1], length=4, prompt=1)
    draws = torch.tensor([0.0, 0.5]), torch.tensor([[0.0, 0.0005, 0.01, 0.9], [0.0, 0.49, 0.5004, 0.51]])
    noised = Noiser(seed=1)(batch, draws)
    torch.testing.assert_close(noised.time, torch.tensor([0.001, 0.5005]))
    assert noised.masked.tolist() == [[False, True, False, False], [False, True, True, False]]


def test_a_draw_equal_to_the_probability_stays_visible():
    """Strictly below: a draw in [0, 1) is below p with probability p, and at p = 0 nothing may be masked."""
    draws = torch.tensor([0.5, 0.0]), torch.tensor([[0.0, 0.4999, 0.5, 0.5001], [0.0, 0.0, 0.0, 0.0]])
    noised = Noiser(seed=1, options=NoiseOptions(time_epsilon=0.0))(batch_of([0, 1], length=4), draws)
    assert noised.masked.tolist() == [[True, True, False, False], [False] * 4]


def test_a_draw_equal_to_the_probability_leaves_the_token_visible():
    """Draws lie in [0, 1), so `<` hides with exactly the probability; at t = 0 nothing may be masked."""
    draws = torch.tensor([0.5, 0.0]), torch.tensor([[0.5, 0.5 - 2**-24], [0.0, 0.0]])
    noised = Noiser(seed=1, options=NoiseOptions(time_epsilon=0.0))(batch_of([0, 1], length=2), draws)
    assert noised.masked.tolist() == [[False, True], [False, False]]


def test_share_of_hidden_tokens_follows_the_schedule():
    batch = batch_of(range(64), length=512)
    for schedule in (Noiser(seed=3), Noiser(seed=3, options=NoiseOptions(schedule="cosine"))):
        noised = schedule.at(batch, 0.3)
        expected = 1 - SCHEDULES[schedule.options.schedule].alpha(torch.tensor(0.3)).item()
        assert noised.masked.double().mean().item() == pytest.approx(expected, abs=0.012)


def test_prompts_and_pads_are_never_hidden():
    noised = Noiser(seed=1).at(batch_of(range(8), prompt=5, padding=7), 1.0)
    assert noised.masked[:, 5:-7].all()
    assert noised.masked.sum() == 8 * (64 - 12)


def test_fixed_levels_share_their_noise_and_suffixes_part_it():
    batch = batch_of(range(16))
    low, high = Noiser(seed=1).at(batch, 0.2), Noiser(seed=1).at(batch, 0.6)
    assert (low.time == 0.2).all()
    assert (high.masked | ~low.masked).all()
    other = Noiser(seed=1, stream_suffix="@0.6").at(batch, 0.6)
    assert not (other.masked | ~low.masked).all()
    assert (Noiser(seed=1, stream_suffix="x")(batch).time != Noiser(seed=1)(batch).time).all()


def test_levels_of_an_evaluation_lie_in_the_unit_interval():
    batch = batch_of(range(4))
    assert not Noiser(seed=1).at(batch, 0.0).masked.any()
    assert Noiser(seed=1).at(batch, 1.0).masked.all()
    for outside in (-0.1, 1.1):
        with pytest.raises(AssertionError, match=r"lies in \[0, 1\]"):
            Noiser(seed=1).at(batch, outside)


def test_time_epsilon_outside_its_range_is_refused():
    for wrong in (1.0, -0.1, math.nan):
        with pytest.raises(ValidationError, match="time_epsilon"):
            NoiseOptions(time_epsilon=wrong)
