"""CompDemo's split: which half of the masked tokens a teacher is shown first (spec section 3).

Each masked token joins set A with probability `share`, independently; with a second tokenizer each chunk
does, so that both models speak about whole chunks. At share 0 the first view masks everything and the
second is asked nothing: the plain view. The draw is a pure function like all noise (design section 5).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.batch import Batch
from tide_megatron.diffusion.link import Reading
from tide_megatron.diffusion.noise import uniforms

SPLIT_STREAM = "complementary"
"""Stream of the split: one draw per position, or per chunk of a teacher with its own tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complementary:
    """How a teacher's masked tokens are split over two views."""

    seed: int
    share: float = 0.5
    """Probability of being shown in the first view."""

    def __post_init__(self) -> None:
        """Refuse a share outside [0, 1]."""
        if not 0.0 <= self.share <= 1.0:
            raise ConfigError(f"shown_share: {self.share} is not in [0, 1]; the paper uses 0.5")

    def shown(self, batch: Batch, reading: Reading, draws: Tensor | None = None) -> Tensor:
        """Return set A: the masked tokens that the first view shows, [samples, length] bool.

        Args:
            batch: sample ids and epochs that key the draws.
            reading: the teacher's copy of the microbatch.
            draws: [samples, length] fp32 uniforms to use instead of the hash (goldens).
        """
        if draws is None:
            epoch, sample_id = batch.epochs[:, None], batch.sample_ids[:, None]
            draws = uniforms(self.seed, epoch, sample_id, SPLIT_STREAM, reading.unit)
        return (draws < self.share) & reading.masked
