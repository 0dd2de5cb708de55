"""Heads cut by vocabulary over 1, 2 and 4 ranks equal the dense form on one rank: values, sums, gradients.

The dense form here is the loss of whole logits, rank by rank, without the head, the exchange or joined rows.
Errors are relative to the largest true number of each tensor: with a wrong adjoint the values agree to 1e-6
and the gradients are garbage.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from goldens.dense import loss_values
from tests.parallel.vocabulary_cases import (
    CASES,
    CLOCK,
    counts_of,
    draw,
    heads_of,
    hidden_of,
    losses_of,
    noised_of,
)
from tests.unit.head.calls import Uncompiled
from tide_megatron.head.gather import row_sizes
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss, HeadOptions
from tide_megatron.head.tiles import CPU_TILE, TILES_ALIVE, score_rows
from tide_megatron.losses import LOSSES
from tide_megatron.losses.base import ColumnLoss
from tide_megatron.losses.rows import Rows, rows_of
from tide_megatron.parallel.exchange import COMM_STATS, gather_parts, padded
from tide_megatron.parallel.vocab_group import VocabGroup

TOLERANCE = 1e-5
ROUNDED = {("jensen_shannon", "large logits"): 4e-5}
"""Log-probabilities near -90 are known to 5e-6 in fp32, in both forms, and this loss's slope is of order 1
there."""
RANKS = (1, 2, 4)
FIXED = TILES_ALIVE * 4 * CPU_TILE
FORMS = {
    # name -> rows' worth of logits that a slab may hold; None: the plain form
    "plain": None,
    "fused, one slab": 1000,
    "fused, slabs of a few rows": 5,
    "fused, every chunk longer than a slab": 1,
    "whole slabs": 1000,
    "whole slabs, every chunk longer": 1,
}


def embedded(case, hidden, weight, gold):
    """Return the student's rows, which a tied head reaches as an embedding too."""
    return hidden + weight[gold] / 4 if case.tied else hidden


def dense(case, parts, losses):
    """Return (values by term, gradients of every source's hidden rows, gradient of the student's head)."""
    heads, counts = heads_of(case), counts_of(losses, parts)
    weight = heads["student"].requires_grad_(True)
    leaves, objective = [], weight.sum() * 0
    means = dict.fromkeys(losses, 0.0)
    for source, noised in enumerate(parts):
        rows, hidden = rows_of(noised), hidden_of(case, noised, source)
        leaves.append(hidden["student"].requires_grad_(True))
        student = embedded(case, leaves[-1], weight, rows.gold) @ weight.T
        for name, loss in losses.items():
            theirs = None if loss.teacher is None else hidden[loss.teacher] @ heads[loss.teacher].T
            values = loss_values(loss, student, theirs, rows, CLOCK)
            mean = (loss.coefficients(rows, CLOCK) * values).sum() / float(counts[name])
            objective = objective + loss.weight * mean
            means[name] += float(mean.detach())
    objective.backward()
    return means, float(objective.detach()), [leaf.grad for leaf in leaves], weight.grad


class Parallel:
    """This rank's part of one case: its microbatch, its columns, and what the group shares."""

    def __init__(self, case, parts, form="plain"):
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self.case, self.heads, self.parts = case, heads_of(case), parts
        world = dist.group.WORLD if ranks > 1 else None
        vocabularies = [len(head) for head in self.heads.values()]
        self.group = VocabGroup.of(vocabularies, ranks, rank, world)
        self.mine = [rows_of(part) for part in parts]
        self.numbers = [hidden_of(case, part, source) for source, part in enumerate(parts)]
        self.leaf = self.numbers[rank]["student"].requires_grad_(True)
        self.weight = self.heads["student"].requires_grad_(True)
        self.added = None if FORMS[form] is None else torch.zeros(self.weight.shape)
        self.is_whole = form.startswith("whole")
        self.options = HeadOptions(form="plain" if FORMS[form] is None else "fused", compiled=self.is_whole)
        self.budget = FIXED + (FORMS[form] or 0) * 3 * 4 * -(-max(vocabularies) // ranks)

    def student(self):
        """Return this rank's rows with the whole head."""
        hidden = embedded(self.case, self.leaf, self.weight, self.mine[self.group.rank].gold)
        return HeadInput(hidden=hidden, weight=self.weight, gradient=self.added)

    def head(self, name):
        """Gather a model's rows; join them with this rank's columns of its head."""
        start, stop = self.group.columns(len(self.heads[name]))
        sizes = [len(hidden[name]) for hidden in self.numbers]
        return HeadInput(
            hidden=gather_parts(self.numbers[self.group.rank][name], sizes, self.group.group, "deliver"),
            weight=self.heads[name][start:stop],
            start=start,
            vocabulary=len(self.heads[name]),
        )

    def gathered(self, head, counts):
        sizes = [[row_sizes(rows)] for rows in self.mine]  # in a run: from the count collective
        return head.gather([self.mine[self.group.rank]], sizes, counts)[0]

    def loss(self, losses, counts):
        head = HeadLoss(losses, self.group, self.options, budget_bytes=self.budget)
        if self.is_whole:
            head.compiler = Uncompiled()
        self.rows = self.gathered(head, {name: float(count) for name, count in counts.items()})
        teachers = {name: self.head(name) for name in ("same", "other")}
        return head(self.student(), teachers, self.rows, CLOCK)

    def weight_gradient(self):
        """Return what this rank adds to the gradient of the student's whole head."""
        whole = torch.zeros_like(self.weight) if self.weight.grad is None else self.weight.grad.clone()
        return whole if self.added is None else whole + self.added


def added(tensor):
    """Add up all ranks' tensors."""
    tensor = tensor.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def error(found, truth):
    """Largest error over the largest true number; where all of these are 0, the largest number found."""
    if not truth.numel():
        return 0.0
    assert found.isfinite().all(), "not finite"
    difference, size = (found - truth).abs().max().item(), truth.abs().max().item()
    return difference / size if size else difference


def compare(name, case_name, form):
    """Return {what: (error, size of the truth)} of one loss in one case on this rank."""
    case = CASES[case_name]
    sources = dist.get_world_size()
    parts = [noised_of(case, source, sources) for source in range(sources)]
    losses = losses_of(name, case)
    means, objective, hidden, weight = dense(case, parts, losses)
    ours = Parallel(case, parts, form)
    result = ours.loss(losses, counts_of(losses, parts))
    result.objective.backward()
    assert list(result.sums) == list(losses)
    pairs = {
        "objective": (added(result.objective.detach()), torch.tensor(objective)),
        "hidden": (ours.leaf.grad, hidden[dist.get_rank()]),
        "weight": (added(ours.weight_gradient()), weight),
    }
    for term, value in result.sums.items():
        assert value.dtype == torch.float64
        pairs[term] = (added(value), torch.tensor(means[term], dtype=torch.float64))
    return {what: (error(*pair), float(pair[1].abs().sum())) for what, pair in pairs.items()}


UNEVEN = ("one vocabulary", "few shared ids", "three vocabularies")
"""Cases that differ in what a rank has of a term."""


def matrix():
    """Yield each loss alone on four ranks, all together on any; the rest of the product is slow.

    Alone on one rank a loss is held to the dense form in tests/unit/head too, whole slabs to tiles.
    """
    for form, name, case, ranks in itertools.product(FORMS, [*LOSSES, "all"], CASES, RANKS):
        if form.startswith("whole"):
            is_wanted = name == "all" and ranks == 4 and FORMS[form] != 1 and case in UNEVEN
        else:
            is_wanted = name == "all" or (ranks == 4 and FORMS[form] != 1)
        yield pytest.param(form, name, case, ranks, marks=() if is_wanted else pytest.mark.slow)


@pytest.mark.parametrize(("form", "name", "case", "ranks"), matrix())
def test_every_loss_equals_the_dense_form(pool, form, name, case, ranks):
    for errors in pool(ranks).run(compare, name, case, form):
        limit = ROUNDED.get((name, case), TOLERANCE)
        too_large = {what: found for what, (found, _) in errors.items() if not found <= limit}
        assert not too_large
        assert case == "no rows" or errors["weight"][1] > 0


def test_cases_are_what_they_say():
    """Ranks without shared columns, without any; rows, chunks and pairs; logits that overflow an exp."""
    assert VocabGroup.of([211], 4, 1).columns(211)[0] > CASES["few shared ids"].shared
    assert VocabGroup.of([211, 190, 320], 4, 3).columns(211) == (211, 211)
    for source in range(4):
        link = noised_of(CASES["one vocabulary"], source, 4).link("other")
        assert link.num_chunks > link.num_pairs > 0
        assert len(link.student_rows[0]) > link.num_chunks
    case = CASES["large logits"]
    rows = hidden_of(case, noised_of(case, 0, 1), 0)["student"] @ heads_of(case)["student"].T
    assert rows.max() > 89
    assert torch.exp(rows.max()).isinf()


def measure(names, case_name):
    """Return the statistics' bytes forward and backward, and the documented formula, on this rank."""
    case, sources = CASES[case_name], dist.get_world_size()
    parts = [noised_of(case, source, sources) for source in range(sources)]
    losses = {key: loss for name in names for key, loss in losses_of(name, case).items()}
    ours = Parallel(case, parts)
    COMM_STATS.take()
    result = ours.loss(losses, counts_of(losses, parts))
    there, calls = COMM_STATS.take()["statistics"], dict(COMM_STATS.calls)
    result.objective.backward()
    back = COMM_STATS.take()["statistics"]
    assert not calls
    linked = ours.rows.rows.links["other"]
    likelihoods = {loss.teacher for loss in losses.values() if not isinstance(loss, ColumnLoss)}
    rows = len(ours.rows.rows.gold)
    numbers = 3 * rows * bool(likelihoods) + 3 * rows * ("same" in likelihoods)
    numbers += 3 * len(linked.gold) * ("other" in likelihoods)
    for loss in losses.values():
        if isinstance(loss, ColumnLoss):
            numbers += 4 * (rows if loss.teacher == "same" else linked.num_pairs)
    return there, back, (sources - 1) * 4 * padded(numbers), numbers


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("names", [("cross_entropy",), ("kl",), ("calm", "calm_tidal"), tuple(LOSSES)])
def test_statistics_move_the_bytes_of_the_formula(pool, names, ranks):
    for there, back, formula, numbers in pool(ranks).run(measure, names, "three vocabularies"):
        assert there == back == formula
        assert numbers > 30


def test_a_group_without_rows_exchanges_nothing(pool):
    assert pool(2).run(measure, tuple(LOSSES), "no rows") == [(0, 0, 0, 0)] * 2


def score(case_name, name):
    """Return whether scores of a model equal the dense ones, and how many rows are right."""
    case, sources = CASES[case_name], dist.get_world_size()
    parts = [noised_of(case, source, sources) for source in range(sources)]
    ours = Parallel(case, parts)
    rows = ours.gathered(HeadLoss({}, ours.group), {}).rows
    whole = torch.cat([hidden[name] for hidden in ours.numbers]).detach() @ ours.heads[name].detach().T
    gold = rows.gold if name != "other" else rows.links["other"].gold
    gold = torch.where(torch.arange(len(gold)) % 3 == 0, whole.argmax(-1), gold)
    likely, is_right, tempered = score_rows(ours.head(name), gold, ours.group.group, temperatures=(0.5, 2.0))
    wanted = torch.nn.functional.cross_entropy(whole, gold, reduction="none")
    assert not likely.requires_grad
    assert torch.equal(is_right, whole.gather(1, gold[:, None])[:, 0] == whole.amax(-1))
    torch.testing.assert_close(tempered.confidence, whole.softmax(-1).amax(-1), rtol=0, atol=1e-5)
    for found, temperature in zip(tempered.nll, (0.5, 2.0), strict=True):
        dense = torch.nn.functional.cross_entropy(whole / temperature, gold, reduction="none")
        torch.testing.assert_close(found, dense, rtol=1e-5, atol=2e-5)
    return (likely - wanted).abs().max().item(), int(is_right.sum()), len(gold)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["student", "other"])
@pytest.mark.parametrize("case", ["three vocabularies", "large logits"])
def test_scores_equal_the_dense_ones(pool, case, name, ranks):
    for difference, right, rows in pool(ranks).run(score, case, name):
        assert difference < 2e-5
        assert 0 < right < rows


def sgd(case_name, rate, form):
    """Return the largest difference of the weights after one step of gradient descent, dense and cut."""
    case, sources = CASES[case_name], dist.get_world_size()
    parts = [noised_of(case, source, sources) for source in range(sources)]
    losses = losses_of("all", case)
    _, _, _, gradient = dense(case, parts, losses)
    ours = Parallel(case, parts, form)
    ours.loss(losses, counts_of(losses, parts)).objective.backward()
    start = draw(case.student, 6, seed=6)
    ours_after, theirs_after = start - rate * added(ours.weight_gradient()), start - rate * gradient
    return (ours_after - theirs_after).abs().max().item(), rate * gradient.abs().max().item()


@pytest.mark.parametrize("form", FORMS)
def test_one_step_of_gradient_descent_gives_the_same_weights(pool, form):
    """Adam and clipping would hide a wrong scale."""
    for difference, moved in pool(4).run(sgd, "tied", 1.0, form):
        assert moved > 0.01
        assert difference < 1e-6


LOGS = {
    "student": [-1e-12, -3e-7, -1e-5, -1e-3, -0.3, -2.0, -11.0, -80.0],
    "teacher": [-2e-6, -4e-4, -0.9, -30.0],
}
"""Log-probabilities of gold ids; each of the student's meets each of the teacher's."""
IDS = 40


def logits_of(log_p, gold, seed):
    """Draw logits that give gold ids some log-probabilities, [rows, ids] fp32, at levels that differ."""
    others = torch.randn(len(gold), IDS, generator=torch.Generator().manual_seed(seed)) * 3
    place = gold[:, None]
    others = others - others.scatter(1, place, -torch.inf).logsumexp(-1, keepdim=True)
    own = -torch.log(torch.expm1(-torch.tensor(log_p, dtype=torch.float64))).float()
    return others.scatter(1, place, own[:, None]) + 20.0 * (torch.arange(len(gold)) % 3 - 1)[:, None]


def exact_log_p(logits, gold):
    """Return log-probabilities of gold ids in fp64, by the sum over the other ids."""
    ratio = logits - logits.gather(1, gold[:, None])
    return -torch.nn.functional.softplus(ratio.scatter(1, gold[:, None], -torch.inf).logsumexp(-1))


def exact_values(losses, student, teacher):
    """Write the losses at temperature 1 out in fp64, from log-likelihoods of one token each."""
    low, high = math.log(1e-7), math.log1p(-1e-7)
    (s, t), values = (part.clamp(low, high) for part in (student, teacher)), {"cross_entropy": -student}
    not_s, not_t = (torch.log(-torch.expm1(part)) for part in (s, t))
    values["calm"] = -(t.exp() * s - torch.expm1(t) * not_s)
    values["reverse_calm"] = -(s.exp() * t - torch.expm1(s) * not_t)
    return {name: values[name] for name in losses}


def near_certain(name, form):
    """Return how far gradients and sums of one loss are from fp64's, relative to each row's, on this rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    pairs = list(itertools.product(*LOGS.values()))
    gold = torch.arange(len(pairs)) * 7 % IDS  # owned by every rank, and the only id of a tile of none
    both = [logits_of(log_p, gold, seed) for seed, log_p in enumerate(zip(*pairs, strict=True))]
    group = VocabGroup.of([IDS, IDS], ranks, rank, dist.group.WORLD if ranks > 1 else None)
    parts = [slice(place * len(pairs) // ranks, (place + 1) * len(pairs) // ranks) for place in range(ranks)]
    rows = [
        Rows(gold=gold[part], sample=gold[part] * 0, time=torch.ones(1), maskable=gold[:1]) for part in parts
    ]
    start, stop = group.columns(IDS)
    losses = {name: LOSSES[name](**({} if name == "cross_entropy" else {"teacher": "t", "temperature": 1.0}))}
    head = HeadLoss(losses, group, HeadOptions(form=form))
    own = both[0][parts[rank]].clone().requires_grad_()
    student = HeadInput(hidden=own, weight=torch.eye(IDS), gradient=torch.zeros(IDS, IDS))
    teacher = HeadInput(hidden=both[1], weight=torch.eye(IDS)[start:stop], start=start, vocabulary=IDS)
    gathered = head.gather([rows[rank]], [[row_sizes(part)] for part in rows], {name: 1.0})[0]
    found = head(student, {"t": teacher}, gathered, CLOCK)
    found.objective.backward()
    leaf = both[0].double().requires_grad_()
    values = exact_values(losses, exact_log_p(leaf, gold), exact_log_p(both[1].double(), gold))[name]
    coefficients = losses[name].coefficients(rows_joined(rows), CLOCK).double()
    total = (coefficients * values).sum()
    total.backward()
    truth = leaf.grad[parts[rank]]
    errors = (own.grad.double() - truth).abs() / truth.abs().amax(1, keepdim=True).clamp_min(1e-30)
    return float(errors.max()), float(added(found.sums[name]) / total.detach() - 1)


def rows_joined(rows):
    """Put rows of one sample each behind each other."""
    gold = torch.cat([part.gold for part in rows])
    return Rows(gold=gold, sample=gold * 0, time=torch.ones(1), maskable=gold[:1])


def all_near_certain():
    """Return the errors of every loss in both forms."""
    names = ("cross_entropy", "calm", "reverse_calm")
    return {(name, form): near_certain(name, form) for name in names for form in ("plain", "fused")}


@pytest.mark.parametrize("ranks", RANKS)
def test_likelihoods_near_0_and_1_keep_their_digits(pool, ranks):
    """Down to log p = -1e-12, where an fp32 softmax says 0 from -1e-7 on."""
    for errors in pool(ranks).run(all_near_certain):
        assert {what: found for what, found in errors.items() if max(map(abs, found)) > 1e-5} == {}
