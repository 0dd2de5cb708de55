"""Does a model mean what it says? Expected calibration error, and its NLL after one fitted temperature.

A student that is taught by soft targets is less sure of itself than one that is taught by gold tokens alone,
and the NLL rewards that. So a comparison by NLL also has to say what is left of the difference when each
model's confidence has been set right by a single number: all logits are divided by a temperature which is
fitted on one half of the samples and used on the other, and the other way round.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tide_megatron.base.segments import segment_sums

TEMPERATURES: tuple[float, ...] = tuple(2.0 ** (step / 8) for step in range(-8, 9))
"""What is tried: 1/2 to 2 in steps of 9 %, with 1 among them."""
BINS = 15
"""Of equal width, over the probability of the most likely token (Guo et al. 2017)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Sums over scored samples; add them over ranks."""

    nll: Tensor
    """[temperatures, samples] fp64: bound of each sample in nats at each of `TEMPERATURES`."""
    bins: Tensor
    """[3, BINS] fp64: masked tokens, summed confidence, right answers by confidence."""

    @classmethod
    def empty(cls, samples: int, device: torch.device) -> Calibration:
        """Start with nothing counted."""
        return cls(
            nll=torch.zeros(len(TEMPERATURES), samples, dtype=torch.float64, device=device),
            bins=torch.zeros(3, BINS, dtype=torch.float64, device=device),
        )

    def add(self, samples: Tensor, nll: Tensor, confidence: Tensor, is_right: Tensor) -> None:
        """Count masked tokens.

        Args:
            samples: [rows] int64: whose tokens they are, by place among the scored samples.
            nll: [temperatures, rows]: what each adds to its sample's bound.
            confidence: [rows] probability of the most likely token.
            is_right: [rows] bool.
        """
        sample, order = samples.sort(stable=True)
        self.nll.add_(segment_sums(nll.T[order].double(), sample, self.nll.shape[1]).T)
        place, order = (confidence * BINS).long().clamp(0, BINS - 1).sort(stable=True)
        counted = torch.stack([torch.ones_like(confidence), confidence, is_right.to(confidence.dtype)], dim=1)
        self.bins.add_(segment_sums(counted[order].double(), place, BINS).T)

    @property
    def expected_error(self) -> float:
        """How far confidence and accuracy are apart, 0 to 1, averaged over masked tokens of all levels."""
        tokens, confidence, right = self.bins
        return float((confidence - right).abs().sum() / tokens.sum().clamp_min(1))

    @property
    def temperature(self) -> float:
        """The temperature that is best for all samples."""
        return TEMPERATURES[int(self.nll.sum(dim=1).argmin())]

    def tempered_nll(self) -> Tensor:
        """Return each sample's bound at the temperature that is best for the other half, [samples] fp64."""
        found = torch.empty_like(self.nll[0])
        for own, other in ((0, 1), (1, 0)):
            best = int(self.nll[:, other::2].sum(dim=1).argmin())
            found[own::2] = self.nll[best, own::2]
        return found

    def summary(self, reply_bytes: Tensor) -> dict[str, Any]:
        """Return plain values for a result file.

        Args:
            reply_bytes: [samples] fp64.
        """
        return {
            "expected_calibration_error": self.expected_error,
            "temperature": self.temperature,
            "tempered_nll_per_byte": float(self.tempered_nll().sum() / reply_bytes.sum()),
        }
