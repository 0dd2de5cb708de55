"""Prepare this process for megatron-core, once, and say what was done."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import sys
import warnings
from collections.abc import Iterator

from tide_megatron.platform.adam import repair_torch_adam
from tide_megatron.platform.cpu import redirect_cuda
from tide_megatron.platform.gloo import allow_uneven_shares, share_one_device
from tide_megatron.platform.grad_norm import use_foreach_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Platform:
    """What was done to this process, for the log and for `tide doctor`."""

    megatron_version: str
    redirected_to_cpu: bool
    torch_adam_repaired: bool


@functools.cache
def prepare_platform() -> Platform:
    """Make megatron-core run here; later calls return the first answer.

    Must come before the first import of megatron-core: importing `tide_megatron.platform` calls it.
    """
    # megatron-core repeats this in every module that it imports; `torch_adam_repaired` says it once.
    warnings.filterwarnings(
        "ignore", message=".*(Apex|Transformer Engine|transformer_engine).* not installed"
    )
    # Said of megatron-core's own default; nothing of ours can heed it.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    # Said whenever core attention is made again, also of other layers than Transformer Engine's.
    warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer")
    with _without("wandb"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each other missing accelerator warns at import as well
        redirected = redirect_cuda()
        allow_uneven_shares()
        share_one_device()
        use_torch_for_routers()
        repaired = repair_torch_adam()
        use_foreach_norm()
    version = importlib.metadata.version("megatron-core")
    return Platform(megatron_version=version, redirected_to_cpu=redirected, torch_adam_repaired=repaired)


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Keep a package from being imported meanwhile; those that would like to have it do without it.

    megatron-core's inference server, which every import of it brings along, reports to wandb. Nothing here
    runs that server, and wandb is a tenth of what a process takes to start; a run that reports to it imports
    it then.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # what Python takes for "there is none"
    try:
        yield
    finally:
        del sys.modules[name]


def use_torch_for_routers() -> None:
    """Make megatron-core's routers multiply by torch, in fp32. Call it before a router runs.

    Our routers keep fp32 weights under bf16 activations, because their scores decide which experts run.
    megatron-core hands both as they are to Transformer Engine's GEMM where that is installed, which wants one
    dtype; its other branch casts both to the router's dtype and multiplies, which is what we mean. Without
    Transformer Engine some releases leave the name undefined, and the router fails with a NameError.
    """
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
