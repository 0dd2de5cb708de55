"""In which form a run computes its head loss, and how much memory its slabs may take."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

from tide_megatron.base.device import Device
from tide_megatron.base.memory import free_bytes
from tide_megatron.head.budget import BUDGET_MIB, MIB, settle_budget
from tide_megatron.head.fused import fused_head_loss
from tide_megatron.head.parts import HeadLossForm
from tide_megatron.head.plain import head_loss
from tide_megatron.head.slabs import rows_within
from tide_megatron.head.tiles import fixed_bytes
from tide_megatron.head.workspace import Workspace
from tide_megatron.losses.shared_vocabulary import SharedVocabulary
from tide_megatron.models.precision import Precision
from tide_megatron.parallel.collectives import gather_vectors
from tide_megatron.train.plans import ModelPlan
from tide_megatron.train.recipe import Recipe

log = logging.getLogger(__name__)


def check_head_budget(recipe: Recipe, plans: Mapping[str, ModelPlan], ranks: int, device: Device) -> None:
    """Refuse a budget that does not hold one row, before any weight is read. Not a collective.

    Args:
        recipe: the run.
        plans: its models.
        ranks: of a head group.
        device: of this rank.

    Raises:
        ConfigError: naming `head.budget_mib`, the value and what is needed.
    """
    if recipe.head.form == "plain":
        return
    budget_mib = recipe.head.budget_mib or BUDGET_MIB[device.type]
    rows_within(budget_mib * MIB, row_bytes(recipe, plans, ranks, device), fixed_bytes(device.torch_device))


def choose_head_loss(
    recipe: Recipe, plans: Mapping[str, ModelPlan], ranks: int, device: Device
) -> HeadLossForm:
    """Choose how the head loss is computed, in this one place, and log it. All ranks call it together.

    Call it when all models are built, and before the first step: what is free then is what a slab may take.

    Args:
        recipe: the run.
        plans: its models.
        ranks: of a head group.
        device: of this rank.

    Raises:
        ConfigError: on every rank alike, for a budget above what some rank has free.
    """
    exact = recipe.head.precision == "fp32"
    words = ", products in fp32" if exact else ""
    if recipe.head.form == "plain":
        log.info("head loss: plain, by autograd%s", words)
        return functools.partial(head_loss, is_exact=exact)
    compiled = device.type == "cuda" if recipe.head.compiled is None else recipe.head.compiled
    words += ", compiled" if compiled else ""
    least_bytes = fixed_bytes(device.torch_device) + row_bytes(recipe, plans, ranks, device)
    free = gather_vectors([float(free_bytes(device.torch_device))])[:, 0].tolist()
    budget = settle_budget(recipe.head.budget_mib, BUDGET_MIB[device.type], least_bytes, free, device.type)
    log.info("head loss: fused, slabs of %d MiB%s", budget // MIB, words)
    return functools.partial(
        fused_head_loss,
        budget_bytes=budget,
        workspace=Workspace(),
        compiled=compiled,
        is_exact=exact,
    )


def row_bytes(recipe: Recipe, plans: Mapping[str, ModelPlan], ranks: int, device: Device) -> int:
    """Return the bytes of the logits that one row keeps on a rank; a teacher row for a row is assumed."""
    kept = {
        "student",
        *(loss.teacher for loss in recipe.terms.values() if isinstance(loss, SharedVocabulary)),
    }
    return sum(
        -(-plan.architecture.vocabulary // ranks) * _product_bytes(recipe, plan, device)
        for name, plan in plans.items()
        if name in kept
    )


def _product_bytes(recipe: Recipe, plan: ModelPlan, device: Device) -> int:
    """Return the bytes of a logit that a model's head keeps."""
    if recipe.head.precision == "fp32":
        return 4
    return Precision.on(plan.choice.precision, device).dtype.itemsize
