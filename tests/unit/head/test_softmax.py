"""Statistics of softmaxes on one rank: log-probabilities, gradients, gold owners; empty and huge logits."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.head.calls import evaluate
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.softmax import (
    LOWEST,
    OnlineLikelihood,
    OnlineSoftmax,
    check_golds,
    gold_logits,
    merge,
)
from tide_megatron.head.tiles import score_rows
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.rows import Columns, Rows


def test_softmaxes_and_likelihoods_of_different_lengths():
    torch.manual_seed(0)
    one, two, three = torch.randn(4, 7, requires_grad=True), torch.randn(3, 5) * 40, torch.randn(2, 6)
    gold = torch.tensor([4, 0, 2])
    likelihood = OnlineLikelihood.of(Columns(logits=two, vocabulary=5), gold)
    found = merge([likelihood], [OnlineSoftmax.of(one), OnlineSoftmax.of(three)], None)
    for softmax, logits in zip(
        (*found.softmaxes, found.likelihoods[0].softmax), (one, three, two), strict=True
    ):
        torch.testing.assert_close(softmax.log_probabilities(logits), logits.log_softmax(-1))
    wanted = two.log_softmax(-1)[torch.arange(3), gold]
    torch.testing.assert_close(found.likelihoods[0].log_probability, wanted)
    assert not found.likelihoods[0].log_probability.requires_grad
    assert not found.softmaxes[1].log_sum.requires_grad
    (found.softmaxes[0].log_probabilities(one)[:, 2].sum() + found.anchor).backward()
    truth = torch.nn.functional.one_hot(torch.tensor(2), 7) - one.detach().softmax(-1)
    torch.testing.assert_close(one.grad, truth)
    assert found.anchor.item() == 0


@pytest.mark.parametrize("level", [-300.0, 0.0, 40.0])
@pytest.mark.parametrize("log_p", [-1e-12, -1e-9, -3e-7, -1e-5, -1e-2, -0.7, -5.0, -20.0, -80.0])
def test_log_probabilities_have_digits_wherever_p_is(log_p, level):
    """Value, 1 - p and gradient against fp64, at once and by tiles; the gold id is the largest, or is not."""
    others = torch.randn(3, 9, generator=torch.Generator().manual_seed(1)) * 4
    gold = torch.tensor([0, 4, 8])
    logits = others - others.scatter(1, gold[:, None], -torch.inf).logsumexp(-1, keepdim=True)
    own = -math.log(math.expm1(-log_p))
    logits = (logits.scatter(1, gold[:, None], own) + level).requires_grad_()
    truth = logits.detach().double().requires_grad_()
    ratio = truth - truth.gather(1, gold[:, None])
    wanted = -torch.nn.functional.softplus(ratio.scatter(1, gold[:, None], -torch.inf).logsumexp(-1))
    wanted.sum().backward()
    (found,) = merge([OnlineLikelihood.of(Columns(logits=logits, vocabulary=9), gold)], [], None).likelihoods
    found.log_probability.sum().backward()
    torch.testing.assert_close(found.log_probability.double(), wanted, rtol=4e-6, atol=0)
    torch.testing.assert_close(found.complement.double(), -torch.expm1(wanted), rtol=4e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), truth.grad, rtol=2e-5, atol=0)
    tiled, kept = OnlineLikelihood(gold), logits.detach().clone()
    for start in (0, 4, 5):
        stop = {0: 4, 4: 5, 5: 9}[start]
        tiled.add(Columns(logits=kept[:, start:stop], start=start, vocabulary=9))
    (again,) = merge([tiled], [], None).likelihoods
    assert torch.equal(kept, logits.detach()), "logits are put back"
    torch.testing.assert_close(again.log_probability, found.log_probability, rtol=4e-6, atol=0)


def test_the_only_id_of_a_vocabulary_is_certain():
    logits = torch.tensor([[3.0], [-2.0]], requires_grad=True)
    seen = OnlineLikelihood.of(Columns(logits=logits, vocabulary=1), torch.zeros(2, dtype=torch.int64))
    (found,) = merge([seen], [], None).likelihoods
    assert found.log_probability.tolist() == [0.0, 0.0]
    found.log_probability.sum().backward()
    assert logits.grad.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("level", [-1000.0, 0.0, 1000.0])
def test_a_shift_of_all_logits_changes_nothing(level):
    logits = torch.tensor([[0.0, 1.0, -2.0]]) + level
    (softmax,) = merge([], [OnlineSoftmax.of(logits)], None).softmaxes
    assert softmax.maximum.item() == level + 1
    wanted = torch.tensor([[0.0, 1.0, -2.0]]).log_softmax(-1)
    torch.testing.assert_close(softmax.log_probabilities(logits), wanted)


def test_gold_logits_are_the_owners():
    logits = torch.arange(12.0).view(4, 3)
    columns = Columns(logits=logits, start=5, vocabulary=10)
    assert gold_logits(columns, torch.tensor([5, 7, 4, 8])).tolist() == [0.0, 5.0, 0.0, 0.0]
    assert gold_logits(columns, torch.tensor([9, 0, 6, 6])).tolist() == [0.0, 0.0, 7.0, 10.0]


def test_without_columns_gold_logits_are_zero_and_keep_the_graph():
    logits = torch.empty(2, 0, requires_grad=True)
    picked = gold_logits(Columns(logits=logits, start=10, vocabulary=10), torch.tensor([3, 9]))
    assert picked.tolist() == [0.0, 0.0]
    assert picked.requires_grad
    assert torch.finfo(torch.float32).min == LOWEST


@pytest.mark.parametrize("gold", [-1, 10])
def test_an_id_that_no_rank_owns_is_refused(gold):
    columns = Columns(logits=torch.zeros(1, 3), start=5, vocabulary=10)
    with pytest.raises(RuntimeError, match="outside the head's 10 ids"):
        check_golds(torch.tensor([gold]), columns.vocabulary)


def test_a_slice_must_lie_in_its_head():
    weight = torch.zeros(3, 2)
    for start in (-1, 8):
        with pytest.raises(AssertionError, match="not in a head of 10"):
            _ = HeadInput(hidden=torch.zeros(1, 2), weight=weight, start=start, vocabulary=10).columns
    columns = HeadInput(hidden=torch.zeros(1, 2), weight=weight, start=7, vocabulary=10).columns
    assert (columns.start, columns.vocabulary, columns.logits.shape) == (7, 10, (1, 3))


def test_scores_of_one_rank():
    """NLL and accuracy; a tie counts as right."""
    head = HeadInput(hidden=torch.eye(3), weight=torch.tensor([[0.0, 2, 1], [1, 2, 0], [0, 1, 0], [0, 0, 0]]))
    nll, is_right, tempered = score_rows(head, torch.tensor([1, 1, 3]), temperatures=(0.5, 1.0, 2.0))
    logits = head.logits
    torch.testing.assert_close(
        nll, torch.nn.functional.cross_entropy(logits, torch.tensor([1, 1, 3]), reduction="none")
    )
    assert is_right.tolist() == [True, True, False]
    torch.testing.assert_close(tempered.confidence, logits.softmax(-1).amax(-1))
    for found, temperature in zip(tempered.nll, (0.5, 1.0, 2.0), strict=True):
        torch.testing.assert_close(
            found,
            torch.nn.functional.cross_entropy(
                logits / temperature, torch.tensor([1, 1, 3]), reduction="none"
            ),
        )
    empty = score_rows(
        HeadInput(hidden=torch.zeros(0, 3), weight=head.weight), torch.zeros(0, dtype=torch.int64)
    )
    assert (empty.nll.shape, empty.is_right.shape, empty.tempered) == ((0,), (0,), None)


def test_no_term_gives_zero_with_a_graph():
    hidden, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    rows = Rows(gold=torch.zeros(2), sample=torch.zeros(2), time=torch.ones(1), maskable=torch.ones(1))
    student = HeadInput(hidden=hidden, weight=weight)
    found = evaluate(student, {}, {"ce": CrossEntropy()}, rows, {"ce": 0.0}, None, form="plain")
    found.objective.backward()
    assert found.sums == {}
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_nothing_is_asserted_on_a_device_whose_context_it_would_end():
    """The loader has looked at every id on the host (tests/unit/data/test_loader.py)."""
    with FakeTensorMode(), Names() as seen:
        gold = torch.empty_strided((3,), (1,), dtype=torch.int64, device="cuda")
        check_golds(gold, 5)
        check_golds(torch.empty_strided((3,), (1,), dtype=torch.int64), 5)
    assert seen.devices == ["cpu"]


class Names(TorchDispatchMode):
    """Note on which devices something is asserted."""

    def __init__(self):
        super().__init__()
        self.devices = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_assert_async" in func.overloadpacket.__name__:
            self.devices.append(args[0].device.type)
        return func(*args, **(kwargs or {}))
