"""When a run goes back: bands, bursts, limits; and a whole run that goes back and reads on."""

import json
import logging
import math

import pytest
import torch
from pydantic import ValidationError

from tests.tiny_run import write_tiny_run
from tide_megatron import api
from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import TideError
from tide_megatron.checkpoint.inspect import values_of
from tide_megatron.train import loop
from tide_megatron.train.guard import LEAST_KNOWN, Guard, GuardOptions

OPTIONS = GuardOptions(band=4.0, patience=2, not_finite=3, returns=2)


def steps(guard, *values, first=0):
    """Hand updates to the guard; return what it said of each."""
    said, step = [], first
    for value in values:
        applied = value is not None
        said.append(
            guard.after_step(
                Clock(step=step, total_steps=999), value or math.nan, value or math.nan, applied=applied
            )
        )
        step += applied
    return said


@pytest.fixture
def guard():
    """Return a guard that knows its band: the median is 1."""
    found = Guard(OPTIONS)
    assert not any(steps(found, *[0.9, 1.0, 1.1] * LEAST_KNOWN))
    return found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((3.9, 3.9, 3.9), [False] * 3),
        ((4.1, 4.1), [False, True]),
        ((4.1, 1.0, 4.1, 1.0), [False] * 4),
        ((None, None, None), [False, False, True]),
        ((None, None, 1.0, None, None), [False] * 5),
        ((9.0, None, 9.0), [False, False, True]),
        ((0.0001, 0.0001), [False, False]),
    ],
)
def test_it_goes_back_after_some_in_a_row_and_not_before(guard, values, said):
    assert steps(guard, *values, first=60) == said


def test_the_last_good_step_is_the_one_before_the_first_bad(guard):
    steps(guard, 9.0, 9.0, first=60)
    assert guard.last_good_step(Clock(step=62, total_steps=999)) == 60
    steps(guard, 1.0, first=62)
    assert guard.last_good_step(Clock(step=63, total_steps=999)) == 63


def test_bad_updates_do_not_widen_the_band(guard):
    assert steps(guard, *[9.0, 1.0] * 200, first=60).count(True) == 0
    assert steps(guard, 5.0, 5.0) == [False, True]


def test_without_a_band_or_before_there_is_one_nothing_is_out_of_it():
    assert not any(steps(Guard(OPTIONS), 1.0, 90.0, 900.0))
    free = Guard(GuardOptions(band=None))
    assert not any(steps(free, *[1.0] * 60, *[1e9] * 60))


def test_a_loss_that_grows_with_the_teachers_share_is_followed():
    """TIDAL's weight may multiply an objective within a run; that is no spike."""
    assert not any(steps(Guard(GuardOptions()), *[4.0 * 1.02**step for step in range(300)]))


def test_after_a_return_it_stands_at_the_old_step_and_reads_on(guard, caplog):
    steps(guard, 9.0, 9.0, first=60)
    clock = guard.returned(
        Clock(step=62, total_steps=99, consumed=500, skipped=1), Clock(step=50, consumed=400)
    )
    assert (clock.step, clock.consumed, clock.skipped, clock.total_steps) == (50, 500, 1, 99)
    assert "the objective, 9, is 9 times the median" in caplog.text
    assert "goes back to step 50, past the samples read since (1 of 2 times)" in caplog.text
    assert not any(steps(guard, 9.0, 9.0, 9.0)), "it learns its band anew"


@pytest.mark.parametrize(
    "words", [{"band": 1.0}, {"band": math.nan}, {"patience": 0}, {"window": 3}, {"returns": -1}]
)
def test_options_that_cannot_be_are_refused(words):
    with pytest.raises(ValidationError):
        GuardOptions(**words)


WORDS = ["device=cpu", "checkpoints.every=4", "evaluation.every=0", "guard.not_finite=2"]


def spoilt(monkeypatch, is_bad):
    """Let updates come out as not finite: by the samples that are read, as bad data would."""
    step, read = loop.train_step, []

    def train_step(run, given, clock, **words):
        ids = tuple(int(sample) for example in given.noised for sample in example.batch.sample_ids)
        read.append((clock.step, clock.consumed, ids))
        if is_bad(clock):
            with torch.no_grad():
                run.student.model.decoder.final_layernorm.weight.fill_(math.nan)
        return step(run, given, clock)

    monkeypatch.setattr(loop, "train_step", train_step)
    return read


def test_a_run_whose_weights_went_bad_goes_back_past_the_samples(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    recipe = write_tiny_run(tmp_path)
    read = spoilt(monkeypatch, lambda clock: clock.consumed == 48)
    result = api.train(recipe, [*WORDS, "steps=9"])
    assert [step for step, *_ in read] == [0, 1, 2, 3, 4, 5, 6, 6, 4, 5, 6, 7, 8]
    assert [consumed for _, consumed, _ in read] == list(range(0, 13 * 8, 8)), "no sample is read again"
    assert result["finished"]
    assert result["clock"] == {"step": 9, "consumed": 104, "skipped": 2}
    assert math.isfinite(result["nll_per_byte"])
    assert "goes back to step 4" in caplog.text
    newest = values_of(tmp_path / "run", tensors=False)
    assert newest["clock"]["step"] == 9
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 9


def test_a_run_that_cannot_go_back_or_did_too_often_ends_with_the_reason(tmp_path, monkeypatch):
    recipe = write_tiny_run(tmp_path)
    spoilt(monkeypatch, lambda clock: clock.step == 2)
    with pytest.raises(
        TideError, match=r"2 updates in a row were not finite \(step 2\), and there is no checkpoint"
    ):
        api.train(recipe, [*WORDS, "steps=9"])
    monkeypatch.undo()
    spoilt(monkeypatch, lambda clock: clock.step >= 5)
    with pytest.raises(TideError, match=r"it went back 1 time\(s\) and came here again"):
        api.train(recipe, [*WORDS, "steps=9", "guard.returns=1", f"folder={tmp_path}/again"])
