"""How vocabulary heads and losses are computed: the `head` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.options import STRICT


def _high_precision(value: object) -> object:
    """Refuse FP8 by name: softmaxes over a vocabulary do not survive it."""
    if isinstance(value, str) and value.startswith("fp8"):
        raise ValueError(
            f"{value} is refused for vocabulary heads (high precision only): use weights or fp32"
        )
    return value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HeadOptions:
    """How vocabulary heads and losses are computed (machine choice: it never changes the mathematics)."""

    form: Literal["fused", "plain"] = "fused"
    """`fused`: values and gradients in one pass over slabs of rows; `plain`: by autograd, with several times
    the memory (the oracle)."""
    budget_mib: int | None = Field(default=None, ge=1)
    """What a slab may take beside weights, hidden rows and their gradients, in MiB; None: 256 on CPU, 6144 on
    CUDA, less where less is free. Smaller slabs read weights and gradients more often."""
    precision: Annotated[Literal["weights", "fp32"], BeforeValidator(_high_precision)] = "weights"
    """In which the heads' products run: `weights`, the dtype of each model, or `fp32`. Statistics, values and
    the head's gradient are fp32 always; FP8 is refused for heads."""
    compiled: bool | None = None
    """Let torch.compile make one kernel of each pass over a slab's logits; None: on CUDA only (on CPU it
    takes tens of seconds to compile)."""
    ranks: int | None = Field(default=None, ge=1)
    """Ranks over which every head is cut by vocabulary; None: the least common multiple of the teachers'
    replicas. More hold less of each head, and send more."""

    @property
    def is_exact(self) -> bool:
        """Whether all products run in fp32."""
        return self.precision == "fp32"

    def is_compiled(self, device: str) -> bool:
        """Say whether the elementwise parts are compiled on this kind of device."""
        return device == "cuda" if self.compiled is None else self.compiled
