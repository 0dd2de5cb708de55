"""What a held-out evaluation does (a recipe's `evaluation`), and how a model opened for it computes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.options import STRICT
from tide_megatron.models.engine import EngineChoice
from tide_megatron.models.precision import Fp8Options

Time = Annotated[float, Field(gt=0.0, le=1.0)]
"""A noise level; at 0 nothing is masked."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluation:
    """Held-out scores at fixed noise levels; they never change training."""

    every: int = Field(default=0, ge=0)
    """Updates between evaluations; 0: only at the end."""
    at_start: bool = False
    """Also score the student before its first update: where curves begin."""
    samples: int = Field(default=256, ge=1)
    """Score so many held-out samples: a fixed draw, each source with its share; at most all of them."""
    times: tuple[Time, ...] = Field(default=(0.1, 0.3, 0.5, 0.7, 0.9), min_length=1)
    """Noise levels at which each of them is masked."""
    microbatch: int = Field(default=16, ge=1)
    """Samples per forward pass and rank."""
    agreement: int = Field(default=0, ge=0)
    """Ask the teachers about so many of these samples, too: how far the student is from each at every noise
    level, and how likely both find the chunks (docs/metrics.md); 0: none. Each is read once a level."""
    calibration: bool = False
    """Also say how far confidence and accuracy are apart, and what one fitted temperature makes of the NLL;
    takes the head's products twice."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Arithmetic:
    """How a frozen model's answers are computed, in the words of a recipe's teachers."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 on CUDA, fp32 on CPU and on GPUs older than sm_80."""
    engine: EngineChoice = "auto"
    """What computes the layers; one that is named runs or is refused."""
    fp8: Fp8Options | None = None
    """Hold and multiply the layers' matrices in FP8; null: in `precision`."""
