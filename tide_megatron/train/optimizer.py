"""Megatron's optimizer around a student: masters in fp32, sharded moments, a rate read from the clock.

megatron-core owns the arithmetic. This file chooses its options, computes the learning rate as a pure
function of the clock (so that nothing needs to be stored or restored for it), and takes the update apart:
without a loss scaler megatron's own `step()` would apply NaN gradients, so norm and finiteness come first,
all ranks agree, and only then is anything changed (design section 9).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import tide_megatron.platform
from tide_megatron.platform.grad_norm import optimizer_kernels

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.process_groups_config import ProcessGroupCollection

from tide_megatron.base.clock import Clock
from tide_megatron.parallel.collectives import all_agree
from tide_megatron.train.recipe import Optimizer

log = logging.getLogger(__name__)


def learning_rate(options: Optimizer, clock: Clock) -> float:
    """Return the rate for the update that follows `clock`: linear warm-up, then cosine or constant.

    The first update already has a positive rate; the last cosine update is just above the minimum.
    """
    warmup = math.floor(options.warmup * clock.total_steps)
    if clock.step < warmup:
        return options.learning_rate * (clock.step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return options.learning_rate
    done = (clock.step - warmup) / max(1, clock.total_steps - warmup)
    share = options.minimum + (1.0 - options.minimum) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return options.learning_rate * share


def build_optimizer(
    options: Optimizer, model: DistributedDataParallel, groups: ProcessGroupCollection, dtype: torch.dtype
) -> Any:
    """Build megatron's optimizer over a wrapped model. All ranks call it together.

    Args:
        options: the recipe's optimizer.
        model: the student inside megatron's DDP.
        groups: the student's process groups.
        dtype: parameter dtype; bf16 parameters get fp32 masters.
    """
    config = OptimizerConfig(
        optimizer="adam" if options.name == "adamw" else "sgd",
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_eps=options.epsilon,
        sgd_momentum=0.0,
        clip_grad=options.clip_norm or 0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=is_sharded(options),
    )
    optimizer = get_megatron_optimizer(
        config,
        [model],
        # Named, because the default differs between versions: norms and biases are not decayed.
        config_overrides=get_standard_config_overrides(config),
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    log.info("optimizer: %s", optimizer_kernels(optimizer))
    return optimizer


def is_sharded(options: Optimizer) -> bool:
    """Say whether masters and moments are sharded over data-parallel ranks (megatron shards Adam only)."""
    return options.distributed and options.name == "adamw"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """What one attempted update did."""

    applied: bool
    grad_norm: float
    """Global norm before clipping; not finite when the update was skipped for it."""
    learning_rate: float


def update(optimizer: Any, options: Optimizer, clock: Clock, *, finite: bool) -> Update:
    """Clip and apply the accumulated gradients, or skip them everywhere. All ranks call it together.

    Args:
        optimizer: what `build_optimizer` returned; gradients are already summed over ranks.
        options: the recipe's optimizer.
        clock: where the run stands (before this update).
        finite: whether THIS rank's objective was finite; one rank's no is everybody's no.
    """
    rate = learning_rate(options, clock)
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm() or 0.0)
    applied = all_agree(finite and math.isfinite(norm))
    if applied:
        if options.clip_norm is not None:
            for part in getattr(optimizer, "chained_optimizers", [optimizer]):
                parameters = part.get_parameters()
                if parameters:
                    clip_grad_by_total_norm_fp32(parameters, options.clip_norm, norm)
        for group in optimizer.param_groups:  # megatron leaves the multipliers to whoever sets the rate
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = options.weight_decay * group.get("wd_mult", 1.0)
        optimizer.step_with_ready_grads()
    return Update(applied=applied, grad_norm=norm, learning_rate=rate)
