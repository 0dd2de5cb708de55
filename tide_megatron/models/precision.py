"""In which number format a model holds its weights, decided once.

`bf16` holds weights and activations in bfloat16; routers keep fp32 weights and scores, the head loss works
in fp32, and the optimizer keeps fp32 masters. `fp32` is what CPU runs and golden comparisons use.

FP8 is no such format: it is how a frozen model's matrices are held and multiplied (`Fp8Options`), while its
precision stays that of everything else.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.base.options import STRICT

NO_PRECISION = (
    "is how matrices of frozen teachers are held (teachers.NAME.fp8), beside a precision for all else; "
    "use bf16 on CUDA, fp32 on CPU"
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Precision:
    """A number format by name: `fp32` or `bf16`."""

    name: str = "fp32"

    def __post_init__(self) -> None:
        """Refuse formats that do not exist here."""
        if self.name.startswith("fp8"):
            raise ConfigError(f"precision: {self.name!r} {NO_PRECISION}")
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


_REFUSED = {
    "delayed": "delayed scales come from the gradients' steps, and a frozen model has none",
    "mxfp8": "mxfp8 needs the tensor cores of Blackwell (sm_100)",
}


def _no_refused(value: object) -> object:
    """Refuse the recipes of Transformer Engine that do not serve a frozen model here, with the reason."""
    if isinstance(value, str) and value in _REFUSED:
        raise ValueError(f"{_REFUSED[value]}: use rowwise, or blockwise with Transformer Engine")
    return value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Fp8Options:
    """Hold a frozen model's matrices in e4m3, half of bf16's bytes, and multiply them by activations in e4m3.

    Norms, routers, embeddings and heads keep the model's precision.
    """

    recipe: Annotated[Literal["rowwise", "blockwise", "tensorwise"], BeforeValidator(_no_refused)] = "rowwise"
    """Which numbers share a scale. `rowwise`: those of a token, and of a row of the weight; `blockwise`: 128
    of a token, and 128 x 128 of the weight; `tensorwise`: all of them, so that a token's answer depends on
    the tokens beside it."""
    first_layers: int = Field(default=0, ge=0)
    """So many layers at the model's beginning stay in its precision."""
    last_layers: int = Field(default=0, ge=0)
    """So many layers at its end stay in its precision."""

    def quantizes(self, layer: int, layers: int) -> bool:
        """Say whether a layer (from 0) of `layers` is quantised."""
        return self.first_layers <= layer < layers - self.last_layers

    def __str__(self) -> str:
        """Name the recipe, and which layers it leaves out."""
        ends = (("first", self.first_layers), ("last", self.last_layers))
        excepted = [f"{number} {end}" for end, number in ends if number]
        return f"FP8 {self.recipe}" + (f" but for {' and '.join(excepted)} layers" if excepted else "")


def numbers(precision: Precision, fp8: Fp8Options | None) -> str:
    """Name the numbers that a model is held and multiplied in, for logs and tables."""
    return precision.name if fp8 is None else f"{precision.name} and {fp8}"
