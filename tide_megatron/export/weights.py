"""The student's weights as they go out: planned, checked against its folder, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.export.flavours import Flavour
from tide_megatron.models.folder import HfFolder
from tide_megatron.models.qwen3 import Qwen3
from tide_megatron.models.shards import Plan, Planned

STORED = "stored"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, STORED: None}


def chosen_dtype(word: str) -> torch.dtype | None:
    """Return the dtype of an export; None: each tensor keeps its own.

    Raises:
        ConfigError: for another word than bf16, fp32 and stored.
    """
    if word not in _DTYPES:
        raise ConfigError(f"--dtype: {word!r} is unknown; {nearest(word, _DTYPES)}")
    return _DTYPES[word]


def plan_weights(
    flavour: Flavour, architecture: Qwen3, source: HfFolder, dtype: torch.dtype | None
) -> dict[str, Planned]:
    """Say what will be written, from the headers of the student's folder alone."""
    shapes = {name: shape for piece in architecture.pieces() for name, shape in piece.sources.items()}
    return {
        name: Planned(shapes[origin], dtype or source.dtype(origin))
        for name, origin in flavour.sources(architecture).items()
    }


def read_weights(
    flavour: Flavour, architecture: Qwen3, source: HfFolder, plan: Plan
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an export, in the plan's order and dtypes."""
    origins = flavour.sources(architecture)
    for name, planned in plan.items():
        yield name, source.read(origins[name]).to(planned.dtype)


def is_exact(plan: Plan, flavour: Flavour, architecture: Qwen3, source: HfFolder) -> bool:
    """Say whether every tensor goes out without rounding."""
    origins = flavour.sources(architecture)
    return all(
        torch.promote_types(planned.dtype, source.dtype(origins[name])) == planned.dtype
        for name, planned in plan.items()
    )
