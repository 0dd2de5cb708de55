"""Where a run may begin that takes another one's weights, and what stays its own."""

import dataclasses

import pytest
import torch

from tests.tiny_run import recipe_tree
from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import TideError
from tide_megatron.checkpoint.metadata import CheckpointMetadata, RunIdentity
from tide_megatron.train.branch import _hyperparameters, _restore, branch_source
from tide_megatron.train.resolve import build_recipe


@pytest.fixture
def tree(tmp_path):
    return build_recipe(recipe_tree(tmp_path))[1]


@pytest.fixture
def other(tmp_path, tree):
    """Write the plain part of another run's checkpoint; return the run's folder."""
    run = RunIdentity(recipe={**tree, "seed": 77}, recipe_digest="abc", data="d" * 64)
    for step in (3, 5):
        folder = tmp_path / f"other/checkpoints/step-{step:08d}-{8 * step:012d}"
        folder.mkdir(parents=True)
        CheckpointMetadata.now(run, Clock(step=step, consumed=8 * step), [step], {}, 1).write(folder)
    return tmp_path / "other"


def source(tree, folder, **optimizer):
    branch = {"folder": str(folder), "optimizer": optimizer.pop("moments", True)}
    recipe, _ = build_recipe({**tree, "branch": branch, "optimizer": {**tree["optimizer"], **optimizer}})
    return branch_source(recipe, recipe.branch)


@pytest.mark.parametrize(
    ("place", "step"), [("", 5), ("checkpoints", 5), ("checkpoints/step-00000003-000000000024", 3)]
)
def test_a_run_or_one_of_its_checkpoints_can_be_branched_from(tree, other, place, step):
    found, told = source(tree, other / place)
    assert found.name == f"step-{step:08d}-{8 * step:012d}"
    assert told == f"step {step} of recipe abc on data {'d' * 16}"


@pytest.mark.parametrize(
    ("place", "optimizer", "said"),
    [
        ("gone", {}, "branch.folder: .*gone: no checkpoint there; give a run folder or a step-"),
        ("step-7", {}, "branch.folder: .*step-7: no such checkpoint"),
        ("", {"name": "sgd"}, r"branch.optimizer: .* optimizer.name=adamw, .*branch.optimizer=false"),
        ("", {"distributed": False}, "branch.optimizer: .* optimizer.distributed=True"),
        ("", {"name": "sgd", "moments": False}, None),
        ("", {"distributed": False, "moments": False}, None),
        ("", {"learning_rate": 1.0, "weight_decay": 0.5, "betas": [0.8, 0.9]}, None),
    ],
    ids=str,
)
def test_what_cannot_be_branched_from_is_named(tree, other, place, optimizer, said):
    if said is None:
        assert source(tree, other / place, **optimizer)
    else:
        with pytest.raises(TideError, match=f"^{said}"):
            source(tree, other / place, **optimizer)


def test_moments_come_along_and_hyperparameters_do_not():
    old, new = (
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=lr, weight_decay=decay, betas=betas)
        for lr, decay, betas in ((0.1, 0.5, (0.8, 0.9)), (0.01, 0.0, (0.9, 0.999)))
    )
    old.param_groups[0]["params"][0].grad = torch.ones(2)
    old.step()
    groups = _hyperparameters(new)
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["weight_decay"] == 0.5, "torch takes them"
    _restore(new, groups)
    (group,) = new.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.01, 0.0, (0.9, 0.999))
    assert new.state[group["params"][0]]["exp_avg"].any()


def test_a_run_without_a_branch_is_the_run_it_was(tree):
    assert dataclasses.replace(build_recipe(tree)[0]).branch is None
