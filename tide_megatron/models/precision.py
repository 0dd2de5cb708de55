"""In which number format a model holds its weights, decided once.

`bf16` holds weights and activations in bfloat16; routers keep fp32 weights and scores, the head loss works
in fp32, and the optimizer keeps fp32 masters. `fp32` is what CPU runs and golden comparisons use. FP8
(Transformer Engine and an emulated engine, design section 8) comes later and will be another value of this
type; until then it is refused by name, never replaced silently.
"""

from __future__ import annotations

import dataclasses

import torch

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, nearest

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Precision:
    """A number format by name: `fp32` or `bf16`."""

    name: str = "fp32"

    def __post_init__(self) -> None:
        """Refuse formats that do not exist here (yet)."""
        if self.name.startswith("fp8"):
            raise ConfigError(f"precision: {self.name!r} is not available yet; use bf16 on CUDA, fp32 on CPU")
        if self.name not in _DTYPES:
            raise ConfigError(f"precision: {self.name!r} is unknown; {nearest(self.name, _DTYPES)}")

    @classmethod
    def on(cls, wanted: str, device: Device) -> Precision:
        """Return the format that a recipe's word means on this device.

        Args:
            wanted: `auto` (bf16 on a GPU that has it, else fp32) or a format's name.
            device: the model's.

        Raises:
            ConfigError: an unknown format, or bf16 on a GPU that does not have it.
        """
        if wanted == "auto":
            return cls("bf16" if device.type == "cuda" and device.has_bf16 else "fp32")
        if wanted == "bf16" and not device.has_bf16:
            raise ConfigError(
                "precision: 'bf16' needs a GPU of sm_80 or newer, and this run has "
                f"{device.described}; use fp32"
            )
        return cls(wanted)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and activations."""
        return _DTYPES[self.name]
