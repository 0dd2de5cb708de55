"""What a GPU could do at most: dense matrix products a second, from its makers' data sheets.

bf16 without sparsity (the sheets' figures "with sparsity" halved), fp32 without TF32, which nothing here
turns on. Sources: NVIDIA's data sheets of H100 (columns SXM, PCIe and NVL), H800, H200 (SXM and NVL), GH200,
H20, A100, A800 and HGX B200. They are reached at the highest clock only. A name that is not in the list has
no peak here, nor has a slice of a GPU (MIG).
"""

from __future__ import annotations

import re

import torch

_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100 80GB HBM3", 989e12, 67e12),
    ("H800", 989e12, 67e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("GH200", 989e12, 67e12),
    ("H20", 148e12, 44e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("B200", 2250e12, None),
)
"""Words of a device's name, FLOP/s in bf16, in fp32; the first line that fits counts."""


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Return the most FLOP/s of one device in a dtype; None where nobody knows.

    Args:
        name: as `torch.cuda.get_device_name` gives it; anything for a CPU.
        dtype: of the matrix products.
    """
    for words, half, single in _PEAKS:
        if re.search(rf"\b{words}\b", name) and not re.search(r"\bMIG\b", name):
            return {torch.bfloat16: half, torch.float32: single}.get(dtype)
    return None
