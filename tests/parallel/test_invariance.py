"""A run means the same on any ranks: 1 rank, 4 with experts over all of them, 2 with accumulation.

Everything is held to the one-rank run, which is the dense computation: losses and gradient norms of ten AdamW
steps without clipping, and the weights after one SGD step, which alone shows a wrong scale.
"""

import pytest
import torch
import torch.distributed as dist

from tests.tiny_run import write_cross_run, write_tiny_run
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import choose_device
from tide_megatron.models.convert import hf_tensors
from tide_megatron.train.assemble import assemble
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.step import train_step

STEPS = 10
TERMS = [
    "losses.tidal.kind=tidal",
    "losses.tidal.teacher=moe",
    "losses.tidal.weight=0.7",
    "losses.reverse.kind=reverse_calm",
    "losses.reverse.teacher=moe",
]
WRITERS = {"one tokenizer": write_tiny_run, "two tokenizers, two teachers, two views": write_cross_run}
LAYOUTS = {  # name -> (ranks, expert, samples a microbatch)
    "4 ranks, experts over 4": (4, 4, 2),
    "2 ranks, experts over 2, accumulation 2": (2, 2, 2),
    "4 ranks, experts over 2": (4, 2, 2),
}


def run_steps(recipe_file, folder, expert, microbatch, words, steps):
    """Run some steps on this rank; return losses, norms, terms, and the weights by Hugging Face name."""
    own = [f"teachers.own.layout.expert={expert}"] if "own:" in recipe_file.read_text() else []
    overrides = [
        f"folder={folder}",
        f"teachers.moe.layout.expert={expert}",
        *own,
        "batch.samples=8",
        f"batch.microbatch={microbatch}",
        "optimizer.clip_norm=null",
        f"steps={STEPS}",
        *TERMS,
        *words,
    ]
    recipe, _ = load_recipe(recipe_file, overrides)
    parts = assemble(recipe, choose_device("cpu"))
    clock, seen = Clock(total_steps=recipe.steps), []
    for _ in range(steps):
        result = train_step(parts.run, parts.loader.update(clock.consumed), clock)
        seen.append([result.objective, result.update.grad_norm, *result.terms.values(), result.hidden])
        assert min(result.objective, result.update.grad_norm) > 0.05, (
            "the absolute tolerance must not matter for these"
        )
        clock = clock.after_step(applied=result.update.applied, samples=parts.loader.update_samples)
    model = parts.run.student.model
    weights = hf_tensors(model, {name: tensor.detach().clone() for name, tensor in model.named_parameters()})
    return seen, weights, dist.get_world_size()


@pytest.fixture(scope="module", params=WRITERS)
def tiny(request, tmp_path_factory):
    return WRITERS[request.param](tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adamw(pool, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adamw")
    return pool(1).run(run_steps, tiny, folder, 1, 8, [], STEPS)[0][0]


@pytest.fixture(scope="module")
def sgd(pool, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sgd")
    words = ["optimizer.name=sgd", "optimizer.warmup=0", "optimizer.learning_rate=0.5"]
    return words, pool(1).run(run_steps, tiny, folder, 1, 8, words, 1)[0][1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_norms_are_those_of_one_rank(pool, tiny, adamw, tmp_path, name):
    ranks, expert, microbatch = LAYOUTS[name]
    for seen, _, world in pool(ranks).run(run_steps, tiny, tmp_path, expert, microbatch, [], STEPS):
        assert world == ranks
        for step, (got, wanted) in enumerate(zip(seen, adamw, strict=True)):
            # The absolute part (two roundings of 1 - t in fp32) serves likelihoods near 0 only.
            assert got == pytest.approx(wanted, rel=1e-5, abs=2.4e-7), f"step {step}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_sgd_step_moves_the_weights_as_on_one_rank(pool, tiny, sgd, tmp_path, name):
    ranks, expert, microbatch = LAYOUTS[name]
    words, wanted = sgd
    for _, weights, _ in pool(ranks).run(run_steps, tiny, tmp_path, expert, microbatch, words, 1):
        assert weights.keys() == wanted.keys()
        for key, weight in weights.items():
            error = (weight - wanted[key]).abs().max() / wanted[key].abs().max()
            assert error <= 1e-5, f"{key}: {error}"


def test_the_steps_do_something(adamw, sgd, pool, tiny, tmp_path):
    losses = torch.tensor([step[0] for step in adamw])
    assert (losses[1:] != losses[:-1]).all(), "equal trajectories prove nothing if nothing changes"
    start = pool(1).run(run_steps, tiny, tmp_path, 1, 8, [], 0)[0][1]
    moved = [float((start[key] - weight).abs().max()) for key, weight in sgd[1].items()]
    assert min(moved) > 1e-5
