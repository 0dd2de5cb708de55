"""How replies are decoded: length, schedule, randomness, where to stop, how many at a time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.errors import ConfigError
from tide_megatron.base.options import MACHINE, STRICT, Paper

ScheduleWord = Literal["count", "reference", "confidence", "entropy"]
THRESHOLDS: dict[ScheduleWord, float] = {"confidence": 0.9, "entropy": 0.1}
"""Schedules that have a threshold, with the one that is taken where none is named."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Decoding:
    """How replies are decoded. Whatever is no machine choice decides the tokens; the rest only the speed."""

    new_tokens: Annotated[int, Paper("256")] = Field(default=256, ge=1)
    """Longest reply, in tokens; a reply ends at the model's last position in any case."""
    steps: Annotated[int | None, Field(ge=1), Paper("256")] = None
    """Denoising steps for `new_tokens`, of which each block gets its share; null: one a token."""
    schedule: ScheduleWord = "count"
    """What a step commits: `count`: its share of the block's tokens, the surest first; `reference`: the same
    as the published sampler does it (prompts padded on the left, the mask token not banned); `confidence`:
    all surer than `threshold`; `entropy`: as many as have less than `threshold` nats together beside the
    least sure. The last two commit one at least, or the share that `steps` asks for."""
    threshold: float | None = Field(default=None, gt=0.0)
    """Of `confidence` (a probability, default 0.9) or `entropy` (nats, default 0.1)."""
    temperature: Annotated[float, Paper("0")] = Field(default=0.0, ge=0.0)
    """0: the likeliest token; else a draw from softmax(logits / temperature)."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the likeliest tokens that have so much probability together."""
    guidance: Annotated[float, Paper("0")] = Field(default=0.0, ge=0.0)
    """Classifier-free guidance w: logits u + (w + 1)(c - u), where u has not seen the prompt; doubles the
    work."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a reply, and are cut from it with what follows."""
    seed: int = 0
    """Of all draws, which depend on it, the prompt's number, the position and the step, and nothing else."""
    batch: Annotated[int, MACHINE] = Field(default=16, ge=1)
    """Replies under way at a time on a rank; under `reference` also how many prompts are padded together,
    which changes their replies."""
    cache: Annotated[bool, MACHINE] = True
    """Keep keys and values of finished blocks; False reads the whole text again at every step."""

    def __post_init__(self) -> None:
        """Refuse a threshold that nobody would look at, or that no probability can be above."""
        if self.threshold is None:
            return
        if self.schedule not in THRESHOLDS:
            raise ConfigError(
                f"threshold: {self.threshold} has no meaning under schedule={self.schedule}; use "
                "schedule=confidence or entropy, or leave it out"
            )
        if self.schedule == "confidence" and self.threshold >= 1.0:
            raise ConfigError(f"threshold: no probability is above {self.threshold}; use one below 1")

    @property
    def limit(self) -> float:
        """The threshold that counts; of schedules without one infinity."""
        return self.threshold or THRESHOLDS.get(self.schedule, float("inf"))
