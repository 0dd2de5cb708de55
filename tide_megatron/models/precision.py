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
    def choose(cls, wanted: str, device_type: str) -> Precision:
        """Return the format a recipe asks for; `auto` is bf16 on CUDA and fp32 on CPU."""
        if wanted == "auto":
            return cls("bf16" if device_type == "cuda" else "fp32")
        return cls(wanted)

    @classmethod
    def on(cls, wanted: str, device: Device) -> Precision:
        """Return the format of a model on this device; `auto` is fp32 on a GPU without bf16.

        Raises:
            ConfigError: bf16 was asked of such a GPU.
        """
        chosen = cls.choose(wanted, device.type)
        if chosen.name != "bf16" or device.has_bf16:
            return chosen
        if wanted == "auto":
            return cls("fp32")
        raise ConfigError(
            f"precision: 'bf16' needs a GPU of sm_80 or newer, and this run has {device.described}; use fp32"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and activations."""
        return _DTYPES[self.name]
