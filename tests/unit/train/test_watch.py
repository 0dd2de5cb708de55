"""The watch computes nothing while steps are finite, and names the right samples when one is not."""

import math
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.diffusion.sides import random_batch
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.head.inputs import HeadInput
from tide_megatron.parallel.vocab_group import VocabGroup
from tide_megatron.teachers.exchange import ViewSize
from tide_megatron.train.watch import AnswerWatch


class Operations(TorchDispatchMode):
    """Lists every tensor operation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def watched(microbatches):
    """Watch a teacher's answers of ones on the second of two places, the first of which asked for 5 rows."""
    rows = [len(noised.row_index[0]) for noised in microbatches]
    asked = [[[ViewSize(3, 14, number)] for number in place] for place in ([5] * len(rows), rows)]
    watch = AnswerWatch(["one"], VocabGroup(size=2, rank=1), SimpleNamespace(view_sizes={"one": asked}))
    answers = [HeadInput(hidden=torch.ones(5 + number, 4), weight=torch.ones(6, 4)) for number in rows]
    with Operations() as operations:
        for noised, answer in zip(microbatches, answers, strict=True):
            watch.keep({"one": answer}, noised)
    return watch, answers, operations.names


def microbatches():
    return [Noiser(seed=1).at(random_batch(seed), 0.6) for seed in (1, 2)]


def test_nothing_is_computed_on_a_finite_step():
    watch, _, operations = watched(microbatches())
    assert operations == []
    assert watch.report() == {}


def test_rows_that_are_not_finite_are_named_by_sample():
    noised = microbatches()
    watch, answers, _ = watched(noised)
    answers[0].hidden[2] = math.nan  # another place's row
    assert watch.report() == {}
    samples = noised[1].row_index[0].tolist()
    answers[1].hidden[5 + samples.index(2), 3] = math.inf
    assert watch.report() == {"one": [102]}
    answers[0].hidden[5 + noised[0].row_index[0].tolist().index(0), 0] = math.nan
    assert watch.report() == {"one": [100, 102]}
