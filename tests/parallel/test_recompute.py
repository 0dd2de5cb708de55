"""Activations made again in the backward pass: every number equal, every attention run twice."""

import pytest
import torch

from tests.tiny_run import write_cross_run
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import choose_device
from tide_megatron.models.attention import PlannedAttention
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import set_up
from tide_megatron.train.step import train_step


def take_steps(recipe_file, folder, word):
    """Make two updates; return losses and norms, gradients, and how often a layer of the student attended."""
    recipe, _ = load_recipe(recipe_file, [f"folder={folder}", "batch.microbatch=4", "steps=2", word])
    parts = set_up(recipe, choose_device("cpu"))
    calls = []
    for module in parts.run.student.model.modules():
        if isinstance(module, PlannedAttention):
            module.register_forward_hook(lambda *_: calls.append(1))
    clock, seen = Clock(total_steps=2), []
    for _ in range(2):
        result = train_step(parts.run, parts.run.read(parts.loader.update(clock.consumed)), clock)
        seen.append((result.objective, result.update.grad_norm, result.cost.flops))
        clock = clock.after_step(applied=result.update.applied, samples=parts.loader.update_samples)
    gradients = {name: value.main_grad.clone() for name, value in parts.run.student.model.named_parameters()}
    return seen, gradients, len(calls)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_cross_run(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputation_changes_nothing_but_work(pool, tiny, tmp_path, ranks):
    kept, *others = (
        pool(ranks).run(take_steps, tiny, tmp_path / word, f"student.recompute={word}")
        for word in ("false", "true", "selective")
    )
    for again in others:
        _compare(again, kept)


def _compare(again, kept):
    for (seen, gradients, calls), (wanted, expected, plain_calls) in zip(again, kept, strict=True):
        assert calls == 2 * plain_calls > 0
        assert seen == wanted  # also the operations that MFU counts: what is made again counts once
        assert all(torch.equal(gradients[name], value) for name, value in expected.items())
