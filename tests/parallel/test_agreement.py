"""What is measured of teachers and terms, on cut heads and layouts, is what whole logits on one rank give."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist

from tests.parallel.test_vocabulary_parallel import Parallel, dense
from tests.parallel.vocabulary_cases import CASES, CLOCK, counts_of, losses_of, noised_of
from tests.tiny_run import PAIR_ON_FOUR, write_pair_run
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import choose_device
from tide_megatron.head.agreement import compare_rows
from tide_megatron.head.loss import HeadLoss
from tide_megatron.head.term_gradients import TermGradients
from tide_megatron.parallel.exchange import COMM_STATS
from tide_megatron.train.agreement import measure_agreement
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import set_up
from tide_megatron.train.step import train_step

IDS = {"one vocabulary": 211, "few shared ids": 50, "three vocabularies": 180, "large logits": 211}


def parts_of(case):
    sources = dist.get_world_size()
    return [noised_of(case, source, sources) for source in range(sources)]


def compared(case_name):
    """Return the errors of KL and of the first ids at all pairs of `same`, and how many ids agree."""
    case = CASES[case_name]
    ours, ids = Parallel(case, parts_of(case)), IDS[case_name]
    student, teacher = (
        torch.cat([hidden[name] for hidden in ours.numbers]).detach() @ ours.heads[name].detach().T
        for name in ("student", "same")
    )
    heads = {name: ours.head(name) for name in ("student", "same")}
    found = compare_rows(heads["student"], heads["same"], ids, ours.group.group)
    ours_log, theirs_log = (logits[:, :ids].double().log_softmax(-1) for logits in (student, teacher))
    kl = (theirs_log.exp() * (theirs_log - ours_log)).sum(-1)
    same = student[:, :ids].argmax(-1) == teacher[:, :ids].argmax(-1)
    itself = compare_rows(heads["same"], heads["same"], ids, ours.group.group)
    assert itself.is_same.all()
    assert itself.kl.abs().max() < 1e-5
    return ((found.kl - kl).abs() / kl.clamp_min(1)).max().item(), torch.equal(found.is_same, same)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", IDS)
def test_agreement_of_rows_is_that_of_whole_logits(pool, case, ranks):
    for error, has_same_ids in pool(ranks).run(compared, case):
        assert error < 1e-5
        assert has_same_ids


def measured(case_name, form):
    """Return what is measured of the terms' gradients on this rank, and the same by the dense form."""
    case = CASES[case_name]
    parts = parts_of(case)
    losses = losses_of("all", case)
    counts = counts_of(losses, parts)
    whole = {name: dense(case, parts, {name: loss})[2] for name, loss in losses.items()}
    flat = {name: torch.cat([part.flatten() for part in parts]).double() for name, parts in whole.items()}
    wanted = {f"gradient_norm/{name}": float(gradient.norm()) for name, gradient in flat.items()}
    gold = flat["cross_entropy"]
    for name, gradient in flat.items():
        if name != "cross_entropy" and len(gold):
            cosine = torch.nn.functional.cosine_similarity(gradient, gold, dim=0)
            wanted[f"gradient_cosine/{name}"] = float(cosine)
    ours = Parallel(case, parts, form)
    head = HeadLoss(losses, ours.group, ours.options, budget_bytes=ours.budget)
    rows = ours.gathered(head, {name: float(count) for name, count in counts.items()})
    teachers = {name: ours.head(name) for name in ("same", "other")}
    COMM_STATS.take()
    gradients = TermGradients(head)
    gradients.add(ours.student(), teachers, rows, CLOCK)
    found = gradients.take(ours.group.group)
    assert not any(COMM_STATS.take().values())
    assert ours.weight.grad is None
    assert ours.leaf.grad is None
    return found, wanted


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("form", ["plain", "fused, one slab", "fused, slabs of a few rows"])
@pytest.mark.parametrize("case", ["three vocabularies", "a source without rows"])
def test_gradients_of_terms_are_those_of_whole_logits(pool, case, form, ranks):
    for found, wanted in pool(ranks).run(measured, case, form):
        assert found == pytest.approx(wanted, rel=2e-5, abs=2e-6)


def run_of(file, words):
    """Return the agreement of a run's two first updates, and what they measured."""
    recipe, _ = load_recipe(file, ["batch.samples=8", "evaluation.agreement=5", *words])
    setup = set_up(recipe, choose_device("cpu"))
    options = dataclasses.replace(recipe.evaluation, microbatch=2)
    clock, seen = Clock(total_steps=recipe.steps), []
    for _ in range(2):
        given = setup.run.read(setup.loader.update(clock.consumed))
        result = train_step(setup.run, given, clock, measures_terms=True)
        clock = clock.after_step(applied=True, samples=setup.loader.update_samples)
        seen.append(result.gradients)
    COMM_STATS.take()
    found = measure_agreement(setup, options)
    assert not any(COMM_STATS.take().values())
    assert setup.run.student.model.training
    return found.values(), found.metrics(), seen


def test_four_ranks_measure_what_one_measures(pool, tmp_path):
    file = write_pair_run(tmp_path / "pair")
    alone = pool(1).run(run_of, file, ["batch.microbatch=4"])[0]
    values, metrics, gradients = alone
    assert set(values["teachers"]) == {"moe", "own", "dense"}
    assert {teacher: one["ids"] for teacher, one in values["teachers"].items()} == {
        "moe": 312,
        "own": 0,
        "dense": 312,
    }
    for one in values["teachers"].values():
        assert sum(row["chunks"] for row in one["by_time"]) == one["chunks"] > 20
        assert sum(one["teacher_likelihoods"]) == sum(one["student_likelihoods"]) == one["chunks"]
    assert "teacher_kl/own" not in metrics
    assert metrics["chunk_kl/own"] > 0
    assert {name for name in gradients[0] if "cosine" in name} == {
        f"gradient_cosine/{term}" for term in ("kl", "reverse", "mixed", "dense")
    }
    for values_4, metrics_4, gradients_4 in pool(4).run(run_of, file, [*PAIR_ON_FOUR]):
        assert metrics_4 == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for before, after in zip(gradients, gradients_4, strict=True):
            assert after == pytest.approx(before, rel=1e-3, abs=1e-5)
        counts = [
            json.dumps([one["pairs"], one["chunks"], one["teacher_likelihoods"]])
            for found in (values, values_4)
            for one in found["teachers"].values()
        ]
        assert counts[:3] == counts[3:]
