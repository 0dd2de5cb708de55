"""The router's product by torch on every machine, where megatron-core might take Transformer Engine's.

Our routers keep fp32 weights under bf16 activations, because their scores decide which experts run.
megatron-core hands both as they are to Transformer Engine's GEMM where that is installed, which wants one
dtype; its other branch casts both to the router's dtype and multiplies, which is what we mean. Without
Transformer Engine some releases leave the name undefined, and the router fails with a NameError.
"""

from __future__ import annotations


def use_torch_for_routers() -> None:
    """Make megatron-core's routers multiply by torch, in fp32. Call it before a router runs."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
