"""Kernels that torch compiles on CUDA, as a plan sees them: what they keep and compute, not how.

FlexAttention and the passes over a slab of logits are one kernel each there. Spelled out in torch's
operations they would keep every score, or several slabs in fp32, which the kernels do not. So attention is
replaced by an operation that allocates and keeps what FlexAttention does, and counts the products of the
pairs that the mask allows; a pass is run as it is written, with only its results counted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_iter

from tide_megatron.diffusion.mask import Context, dense_mask
from tide_megatron.head.compiler import PassCompiler
from tide_megatron.models.flex import CompiledFlex
from tide_megatron.plan.recorder import Recorder

Result = TypeVar("Result")


class PlannedFlex(CompiledFlex):
    """FlexAttention of one model in a plan; an `attention.KernelMaker`."""

    def __init__(self, owner: str, recorder: Recorder) -> None:
        """Book what is computed on a recorder."""
        super().__init__(owner)
        self._recorder = recorder

    def __call__(  # type: ignore[override]
        self, context: Context, length: int, segments: Tensor | None, device: torch.device
    ) -> _FlexKernel:
        """Make the kernel of a view; pads and segments hide more than is counted here."""
        return _FlexKernel(share=_share(context, length), recorder=self._recorder)


@dataclasses.dataclass(frozen=True)
class _FlexKernel:
    """Attention of one view."""

    share: float
    recorder: Recorder

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer: Tensor = _Attend.apply(query, key, value, self.recorder, self.share)  # type: ignore[no-untyped-call]
        return answer


class _Attend(Function):
    """What FlexAttention keeps: its inputs, its answer, and a number a query and head."""

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, recorder: Recorder, share: float
    ) -> Tensor:
        """Return the answer; two products."""
        answer, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, answer, sums)
        context.recorder, context.share = recorder, share
        recorder.add_flops(2 * _product(query, key, share))
        return answer

    @staticmethod
    def backward(context: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; five products."""
        query, key, value, _, _ = context.saved_tensors
        context.recorder.add_flops(5 * _product(query, key, context.share))
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def _product(query: Tensor, key: Tensor, share: float) -> int:
    """Return the FLOPs of one product of the pairs that are computed."""
    return int(2 * query.numel() * key.shape[2] * share)


@functools.lru_cache(maxsize=32)
def _share(context: Context, length: int) -> float:
    """Return the share of all pairs that may attend."""
    return float(dense_mask(context, length).float().mean())


class PlannedCompiler(PassCompiler):
    """Passes over a slab in a plan: run as written, their results alone counted."""

    def __init__(self, recorder: Recorder) -> None:
        """Count on a recorder."""
        super().__init__()
        self._recorder = recorder

    def run(self, function: Callable[..., Result], options: tuple[Hashable, ...], *inputs: Any) -> Result:
        """Call a function."""
        with self._recorder.muted():
            found = function(*options, *inputs)
        made = [part for part in tree_iter(found) if isinstance(part, Tensor)]
        self._recorder.adopt(made, self._recorder.label())
        return found
