"""Take gradient norms without a wait per parameter, where megatron-core has no fused kernel to do it.

megatron-core uses the multi-tensor kernels of Transformer Engine, else NVIDIA Apex's. Where neither is
installed its own stand-in makes a Python number of each parameter's norm, for which the host waits each time,
and multiplies gradients one by one. torch has both for lists of tensors.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def use_foreach_norm() -> bool:
    """Put torch's functions in the place of megatron-core's stand-ins.

    Returns:
        False, with nothing changed, where megatron-core has fused kernels.

    Call it once per process, after `redirect_cuda` (`platform.prepare_platform` does).
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is not utils.local_multi_tensor_l2_norm:
        return False
    clip_grads.l2_norm_impl = foreach_norm
    clip_grads.multi_tensor_scale_impl = foreach_scale
    return True


def foreach_norm(
    chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Return the norm [1] fp32 of all tensors as one vector, in the form of Apex's `multi_tensor_l2norm`."""
    norms = [norm for tensors in lists for norm in torch._foreach_norm(tensors)]
    return torch.linalg.vector_norm(torch.stack(norms).float()).view(1), None


def foreach_scale(chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], scale: float) -> None:
    """Write the first list's tensors, times a number, to the second's, which may be the same."""
    sources, targets = lists
    if any(source is not target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, scale)


def optimizer_kernels(optimizer: Any) -> str:
    """Say which code really updates and takes norms, for the log.

    Args:
        optimizer: megatron-core's, or several of its in a chain.
    """
    from megatron.core.optimizer import clip_grads

    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    updates = sorted({_origin(type(part.optimizer)) for part in parts if part.optimizer is not None})
    note = "; the apex installed here is PyPI's, not NVIDIA's: not used" if has_foreign_apex() else ""
    return f"{', '.join(updates) or 'nothing to update'}; gradient norm by {_norm(clip_grads)}{note}"


def has_foreign_apex() -> bool:
    """Say whether the package that PyPI calls apex is here, which has none of NVIDIA's kernels."""
    try:
        importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec("amp_C") is None


def _norm(clip_grads: Any) -> str:
    if clip_grads.l2_norm_impl is foreach_norm:
        return "torch's foreach functions"
    return _origin(clip_grads.l2_norm_impl)


def _origin(what: Any) -> str:
    """Name a class or function by whom it comes from."""
    package = str(what.__module__ or "?").partition(".")[0]
    names = {"torch": "torch's", "apex": "NVIDIA Apex's", "amp_C": "NVIDIA Apex's"}
    fallback = "Transformer Engine's" if package.startswith("transformer_engine") else f"{package}'s"
    return f"{names.get(package, fallback)} {what.__name__}"
