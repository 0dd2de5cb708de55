"""megatron-core made to run on CPU + gloo as on CUDA + NCCL; importing this package prepares the process.

A module of ours that imports megatron-core imports `tide_megatron.platform` first. On a CUDA machine nothing
that means the GPU is changed; routers multiply by torch there too (`use_torch_for_routers`).
"""

from tide_megatron.platform.prepare import Platform, prepare_platform

prepare_platform()

from tide_megatron.platform.distributed import seed_all, start_distributed, stop_distributed  # noqa: E402

__all__ = ["Platform", "prepare_platform", "seed_all", "start_distributed", "stop_distributed"]
