"""Repair what megatron-core's distributed optimizer does to torch's Adam around checkpoints.

Where neither Transformer Engine nor Apex is installed (every CPU, many GPU boxes) Megatron's
DistributedOptimizer runs `torch.optim.AdamW`, whose per-parameter `step` tensor it mishandles:

a. it stores the step in the parameter groups, then a fully reshardable load also asks for it as state
   (KeyError 'step'), and a dp-reshardable load into a fresh optimizer silently resets it to 0;
b. after `load_state_dict` all parameters share ONE step tensor, so each update counts once per parameter
   and Adam's bias correction is wrong from then on, without any error;
c. before its first update an optimizer can be neither saved nor loaded into (it asserts on the missing
   step);
d. a dp-reshardable load of fp32 parameters copies in place into a leaf that requires grad.

The repair wraps three methods and holds no version number. Left out: the replicated optimizer, which needs
none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def repair_torch_adam() -> bool:
    """Wrap the distributed optimizer so that torch's Adam saves and resumes bit for bit.

    Returns:
        False, with nothing changed, where Transformer Engine or Apex provides Megatron's Adam.

    Call it once per process, after `redirect_cuda` (`platform.prepare_platform` does).
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return False
    optimizer_class = distrib_optimizer.DistributedOptimizer
    _keep_restored_step(optimizer_class)
    _separate_steps_after_load(optimizer_class)
    _let_fresh_ones_be_saved(optimizer_class)
    return True


def _keep_restored_step(optimizer_class: Any) -> None:
    """Faults a and d: the step that came back with the parameter groups wins; copies happen without grad."""
    original = optimizer_class._set_main_param_and_optimizer_states

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        parameter = self.optimizer.param_groups[group]["params"][order]
        step = self.optimizer.state[parameter].get("step")
        if step is not None:
            tensors = {**tensors, "step": step.clone()}
        original(self, model_param, tensors)

    optimizer_class._set_main_param_and_optimizer_states = set_states


def _separate_steps_after_load(optimizer_class: Any) -> None:
    """Fault b: give each parameter a step tensor of its own again."""
    original = optimizer_class.load_state_dict

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original(self, state_dict)
        for state in _torch_states(self.optimizer):
            if "step" in state:
                state["step"] = state["step"].detach().clone()

    optimizer_class.load_state_dict = load_state_dict


def _let_fresh_ones_be_saved(optimizer_class: Any) -> None:
    """Fault c: before the first update, fill in the state that Adam would start from."""
    original = optimizer_class.state_dict

    def state_dict(self: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.Optimizer):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if not self.optimizer.state[parameter]:
                        self.optimizer.state[parameter] = _fresh_state(parameter)
        return original(self)

    optimizer_class.state_dict = state_dict


def _torch_states(optimizer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the state of each parameter; nothing for optimizers that are not torch's."""
    if isinstance(optimizer, torch.optim.Optimizer):
        yield from optimizer.state.values()


def _fresh_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
