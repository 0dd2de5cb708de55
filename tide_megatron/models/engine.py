"""Which engine computes a model's layers: decided in one place, from what there is, and told.

| engine | layers | runs on |
|---|---|---|
| `te` | Transformer Engine's: norm and linear in one, all experts of a layer in one grouped product | CUDA |
| `local` | megatron-core's own, in torch | anything |
| `scaled` | frozen FP8 layers by torch's scaled products (`fp8_engine`) | CPU, CUDA from sm_89 on |
| `emulated` | frozen FP8 layers by casts and fp32 products, to test (`fp8_engine`) | anything |

An engine that a recipe names runs or is refused. `auto` takes `local` until a GPU has shown that `te` gives
the same, and `why` says what spoke against a better one: nothing is replaced silently. In one precision the
engines mean the same arithmetic and differ in rounding and order of sums, as attention kernels do: a run may
change its engine.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.base.transformer_engine import TransformerEngine, find_transformer_engine
from tide_megatron.models.precision import Precision

EngineName = Literal["te", "scaled", "local", "emulated"]
EngineChoice = Literal["auto", "te", "scaled", "local", "emulated"]
_NAMES = ("te", "scaled", "local", "emulated")
_OLDEST = (2, 2)
"""Of Transformer Engine; experts need its fused permutation of tokens by a mask."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """What computes a model's layers, and why it does."""

    name: EngineName = "local"
    why: str = ""
    """What it is of, or what spoke against a better one."""

    @classmethod
    def on(
        cls, wanted: str, precision: Precision, device: Device, library: TransformerEngine | None = None
    ) -> Engine:
        """Return the engine that a recipe's word means here.

        Args:
            wanted: `auto` or an engine's name.
            precision: the model's.
            device: the model's.
            library: Transformer Engine as this process has it; None: as this process finds it.

        Raises:
            ConfigError: an unknown engine, or one that cannot run here; begins with "engine:".
        """
        if wanted not in ("auto", *_NAMES):
            raise ConfigError(f"engine: {wanted!r} is unknown; {nearest(wanted, ('auto', *_NAMES))}")
        if wanted in ("scaled", "emulated"):
            raise ConfigError(
                f"engine: {wanted!r} computes frozen teachers in FP8 alone, and fp8 is not set; use auto, "
                "te or local"
            )
        if wanted == "local":
            return cls(name="local", why="as asked")
        library = library or find_transformer_engine()
        fault = against_te(precision, device, library)
        if wanted == "auto":
            return cls(
                name="local", why=fault or f"{library} is here for engine=te, which no GPU has proven yet"
            )
        if fault:
            raise ConfigError(f"engine: 'te' cannot run: {fault}; use engine=auto or engine=local")
        return cls(name="te", why=str(library))

    def __str__(self) -> str:
        """Name it, and say why it is this one."""
        return f"{self.name} engine ({self.why})" if self.why else f"{self.name} engine"


def against_te(precision: Precision, device: Device, library: TransformerEngine) -> str:
    """Say why Transformer Engine's layers cannot run; empty where they can.

    Args:
        precision: the model's.
        device: the model's.
        library: Transformer Engine as this process has it.
    """
    if device.type != "cuda":
        return "Transformer Engine needs a CUDA device, and this model is on the CPU"
    is_planned = device.capability is None  # a GPU elsewhere: what is installed beside it is not known here
    if not library.is_usable and not is_planned:
        return str(library)
    if library.is_older_than(_OLDEST):
        return f"{library} is older than {'.'.join(map(str, _OLDEST))}"
    if precision.dtype is torch.float32:
        return "Transformer Engine multiplies fp32 in TF32, which is not fp32"
    return ""
