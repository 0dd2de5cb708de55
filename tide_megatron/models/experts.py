"""The experts of a mixture layer: three forms of one arithmetic, under megatron-core's own parameter names.

`sequential` is megatron-core's: a whole feed-forward layer per expert, one after the other. `loop` multiplies
expert by expert too, but writes all products into one tensor, and everything between the two products is one
call for all tokens. `grouped` hands both products to `torch._grouped_mm`, which reads from the device where
each expert's tokens end: nobody waits for a number. On CPU it makes the same products one by one; there the
two are about as fast (tools/bench/experts.py), and `loop` needs no trained weights stacked.

Both of ours keep each expert's weights as parameters of their own, so checkpoints, mappings and optimizer
states know no difference. `torch._grouped_mm` wants them in one tensor: a frozen model's lie in one from the
start (`lay_out`), a trained one's are stacked for each product, since its optimizer decides where they lie.

Left out: biases, and quantised weights.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.autograd import Function

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, nearest

logger = logging.getLogger(__name__)

# Major compute capabilities for which torch builds a grouped product that waits for none.
_WITH_KERNEL = (9, 10)
_ALIGNED = 8  # bf16 numbers in the 16 bytes that a row of its operands must be a multiple of


class LoopedExperts(SequentialMLP):  # type: ignore[misc]
    """megatron-core's experts with one product each, and one call for all of whatever is not a product."""

    asks_host = True
    """Whether the host must know how many tokens each expert has."""

    def forward(self, tokens: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Return ([tokens, hidden] in the tokens' order and dtype, None), each row times its weight.

        Args:
            tokens: [tokens, hidden], ordered by expert.
            counts: [experts] int64 tokens of each.
            probs: [tokens] fp32 weights.
        """
        ends = counts.cumsum(0)
        hidden = self._activate(self._product("linear_fc1", tokens, ends), probs)
        return self._product("linear_fc2", hidden, ends), None

    def _product(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        """Multiply each expert's rows by the transpose of its weight of a name."""
        product: Tensor = _Looped.apply(rows, ends.tolist(), *self._weights(name))  # type: ignore[no-untyped-call]
        return product

    def _weights(self, name: str) -> list[Tensor]:
        """Return the weights of a name [out, in] of all experts."""
        return [getattr(expert, name).weight for expert in self.local_experts]

    def _activate(self, hidden: Tensor, probs: Tensor) -> Tensor:
        """Return the gated half of [tokens, 2 x width], times the weights, as megatron-core's MLP does."""
        if self.config.bias_activation_fusion:
            fused: Tensor = weighted_bias_swiglu_impl(hidden, None, probs[:, None])
            return fused
        gate, up = hidden.chunk(2, dim=-1)
        gated: Tensor = self.config.activation_func(gate) * up * probs[:, None]
        return gated.to(hidden.dtype)


class GroupedExperts(LoopedExperts):
    """megatron-core's experts with one grouped product for all."""

    asks_host = False
    _stacks: Mapping[str, Tensor] = MappingProxyType({})
    """Name -> the weights [experts, out, in] of a frozen model in one tensor."""

    def lay_out(self) -> None:
        """Move the weights of a name into one tensor, of which they stay views. For frozen models.

        Nothing may move the parameters afterwards.
        """
        stacks = {}
        for name in ("linear_fc1", "linear_fc2"):
            weights = self._weights(name)
            stacks[name] = torch.stack([weight.detach() for weight in weights])
            for weight, part in zip(weights, stacks[name], strict=True):
                weight.data = part
        self._stacks = stacks

    def _product(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        """Multiply each expert's rows by the transpose of its weight of a name."""
        ends = ends.to(torch.int32)
        stack = self._stacks.get(name)
        if stack is not None:
            first = getattr(self.local_experts[0], name).weight
            assert stack.data_ptr() == first.data_ptr(), (
                "the experts' weights were moved after they were laid out"
            )
            if not torch.is_grad_enabled():
                return grouped_product(rows, stack.transpose(1, 2), ends)
        product: Tensor = _Grouped.apply(rows, ends, *self._weights(name))  # type: ignore[no-untyped-call]
        return product


FORMS: dict[str, Any] = {
    "sequential": SequentialMLP,
    "loop": LoopedExperts,
    "grouped": GroupedExperts,
}
"""Word in a recipe -> megatron-core module in the experts' slot."""


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return what torch's grouped product gives: [rows, out], or [groups, rows, columns] of two matrices.

    Args:
        rows: [rows, in], ordered by group; or [out, rows].
        matrices: [groups, in, out]; or [rows, in].
        ends: [groups] int32: where each group's rows end, on the operands' device.
    """
    product: Tensor = torch._grouped_mm(rows, matrices, offs=ends)
    return product


class _Looped(Function):
    """Products of groups of rows with a matrix each, one after the other into one tensor."""

    @staticmethod
    def forward(context: Any, rows: Tensor, ends: Sequence[int], *weights: Tensor) -> Tensor:
        """Return [rows, out]."""
        context.save_for_backward(rows, *weights)
        context.ends = ends
        product = rows.new_empty(len(rows), len(weights[0]))
        for weight, group in zip(weights, groups_of(ends), strict=True):
            torch.mm(rows[group], weight.T, out=product[group])
        return product

    @staticmethod
    def backward(context: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivative of the rows and of each weight."""
        rows, *weights = context.saved_tensors
        (slope,) = incoming
        into_rows = torch.empty_like(rows) if context.needs_input_grad[0] else None
        into_weights: list[Tensor | None] = []
        for weight, group in zip(weights, groups_of(context.ends), strict=True):
            if into_rows is not None:
                torch.mm(slope[group], weight, out=into_rows[group])
            into_weights.append(slope[group].T @ rows[group] if weight.requires_grad else None)
        return into_rows, None, *into_weights


class _Grouped(Function):
    """Products of groups of rows with a matrix each, in one call of torch's."""

    @staticmethod
    def forward(context: Any, rows: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        """Return [rows, out]."""
        # Not the stack: it would be a second copy of every trained expert until the backward pass.
        context.save_for_backward(rows, ends, *weights)
        return grouped_product(rows, torch.stack(weights).transpose(1, 2), ends)

    @staticmethod
    def backward(context: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivative of the rows and of each weight."""
        rows, ends, *weights = context.saved_tensors
        slope = incoming[0].contiguous()
        into_rows = (
            grouped_product(slope, torch.stack(weights), ends) if context.needs_input_grad[0] else None
        )
        if not weights[0].requires_grad:
            return into_rows, None, *(None for _ in weights)
        into_weights = grouped_product(slope.T, rows, ends)  # [experts, out, in]
        # What torch leaves where a group has no rows is promised nowhere.
        is_empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        return into_rows, None, *into_weights.masked_fill_(is_empty[:, None, None], 0.0)


def groups_of(ends: Sequence[int]) -> list[slice]:
    """Return each group's rows, which end where the next one's begin."""
    return [slice(start, end) for start, end in itertools.pairwise((0, *ends))]


def choose_form(wanted: str, device: Device, dtype: torch.dtype, widths: Sequence[int], owner: str) -> str:
    """Choose the form of a mixture's experts, in this one place, and log it with the reason.

    Args:
        wanted: `auto` (grouped where torch's kernel runs without a wait, else loop) or a key of FORMS.
        device: where they run.
        dtype: of weights and activations.
        widths: what an expert maps from and to on this rank: hidden size and inner width.
        owner: whose experts they are, for the log.

    Raises:
        ConfigError: for an unknown word, or for `grouped` on a GPU where torch would fall back to waiting.
    """
    if wanted not in ("auto", *FORMS):
        raise ConfigError(f"experts: {wanted!r} is unknown; {nearest(wanted, ('auto', *FORMS))}")
    lack = _lack(device, dtype, widths)
    if wanted == "grouped" and lack and device.type == "cuda":
        raise ConfigError(f"experts: grouped is not available here ({lack}); use loop or auto")
    if wanted == "grouped" and not hasattr(torch, "_grouped_mm"):
        raise ConfigError(f"experts: torch {torch.__version__} has no grouped product; use loop or auto")
    name = wanted if wanted != "auto" else "loop" if lack else "grouped"
    reason = f" (auto: {lack or 'torch._grouped_mm'})" if wanted == "auto" else ""
    logger.info("experts of %s: %s on %s%s", owner, name, device.type, reason)
    return name


def _lack(device: Device, dtype: torch.dtype, widths: Sequence[int]) -> str:
    """Say why torch's grouped product does not run on a device without waiting for it; empty: it does."""
    if device.type == "cpu":
        return "on CPU the loop is as fast"
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has none"
    if dtype is not torch.bfloat16:
        return f"torch's kernel multiplies bf16, not {str(dtype).removeprefix('torch.')}"
    if device.capability is None or device.capability[0] not in _WITH_KERNEL:
        return f"torch has no kernel for {device.described}"
    odd = [width for width in widths if width % _ALIGNED]
    return f"width {odd[0]} is no multiple of {_ALIGNED}" if odd else ""


def put_experts(layer: Any, form: str) -> None:
    """Put experts of a form into the slot of a layer's submodules, if it is a mixture layer.

    megatron-core describes a module by a ModuleSpec or, from 0.17 on, by a partial call.
    """
    slots = _submodules(layer.mlp)
    if isinstance(slots, MoESubmodules):
        kind, inner = FORMS[form], _submodules(slots.experts)
        if isinstance(slots.experts, ModuleSpec):
            slots.experts = ModuleSpec(module=kind, submodules=inner)
        else:
            slots.experts = functools.partial(kind, submodules=inner)


def _submodules(spec: Any) -> Any:
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords.get("submodules")
