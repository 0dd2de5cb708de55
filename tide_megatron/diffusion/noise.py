"""Noise as a pure function: which tokens of a sample are masked depends on that sample alone.

Every uniform is a hash of (seed, epoch, sample id, stream name, index), so a run masks the same tokens
on 1 rank or 64, with any accumulation, after a restart, and on every device (design section 5). There is
no generator state to save and no global one to disturb. The hash absorbs one 64-bit word at a time with
the finaliser of splitmix64 (Steele, Lea, Flood 2014), which turns neighbouring words into unrelated
ones; int64 tensors wrap around exactly as unsigned 64-bit arithmetic does, and the top 24 bits become an
exact fp32 in [0, 1).

Left out: stratified or antithetic times (the reference draws one plain t per sample, spec section 1 item
2).
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tide_megatron.base.options import STRICT, Paper
from tide_megatron.diffusion.alignment import mask_whole_chunks
from tide_megatron.diffusion.batch import Batch, Noised
from tide_megatron.diffusion.schedule import SCHEDULES, ScheduleName

TIME_STREAM = "time"
"""Stream of the noise level: one draw per sample, index 0."""
MASK_STREAM = "hide"
"""Stream of the masked set: one draw per position. (An old word; draws, and so every run, depend on it.)"""


def _signed(word: int) -> int:
    """Read the low 64 bits of an integer as two's complement, which is how int64 tensors hold them."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """Shift in zeros; int64's own shift would copy the sign bit."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _absorb(state: Tensor, word: Tensor) -> Tensor:
    """Fold one word into the state: xor, add the golden ratio, then splitmix64's finaliser (a bijection)."""
    state = (state ^ word) + _GAMMA
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def stream_word(stream: str) -> int:
    """Return the int64 that stands for a stream name (8 bytes of BLAKE2b, little endian)."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(seed: int, epoch: Tensor, sample_id: Tensor, stream: str, index: Tensor) -> Tensor:
    """Draw fp32 uniforms in [0, 1) on the 2^-24 grid, a pure function of the five arguments.

    Args:
        seed: the run's seed; only its low 64 bits count.
        epoch: int64, any shape.
        sample_id: int64, broadcastable.
        stream: what the draw is for ("time", "hide"); streams are independent of each other.
        index: int64, broadcastable: position or chunk inside the sample.

    Returns:
        fp32 of the broadcast shape, on the tensors' device.
    """
    state = torch.zeros((), dtype=torch.int64, device=index.device)
    words = (torch.full_like(state, _signed(seed)), torch.full_like(state, stream_word(stream)))
    for word in (*words, epoch, sample_id, index):
        state = _absorb(state, word)
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoiseOptions:
    """The forward process (spec section 1)."""

    schedule: Annotated[ScheduleName, Paper("linear")] = "linear"
    """How likely a token is masked at noise level t: `linear`: t; `cosine`: cos(pi/2 (1 - t))."""
    time_epsilon: float = Field(default=1e-3, ge=0.0, lt=1.0)
    """Smallest noise level (reference: 0.001)."""
    chunk_hiding: Annotated[Literal["whole", "as_drawn"], Paper("whole")] = "whole"
    """Where a teacher has its own tokens: `whole` masks a chunk whole as soon as one of its tokens is drawn
    (the paper's rule, which masks more than the noise level says); `as_drawn` masks what was drawn, and only
    chunks that happen to be masked whole enter a loss."""
    chunks_of: tuple[str, ...] | None = None
    """Sides of the data whose chunks `whole` keeps together; None: those that the teachers read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noiser:
    """Masks tokens of a batch: one noise level per sample, each maskable token masked with 1 - alpha(t)."""

    seed: int
    options: NoiseOptions = dataclasses.field(default_factory=NoiseOptions)
    stream_suffix: str = ""
    """Appended to stream names: tells uses of the same seed and samples apart (levels of an evaluation)."""
    whole_chunks_of: tuple[str, ...] = ()
    """Sides of the batch whose chunks are masked whole or not at all; none: tokens are masked as drawn."""

    def __call__(self, batch: Batch, uniforms: tuple[Tensor, Tensor] | None = None) -> Noised:
        """Mask tokens at random noise levels (spec section 1 items 1 to 3).

        Args:
            batch: clean examples.
            uniforms: ([samples], [samples, length]) fp32 draws to use instead of the hash (goldens).
        """
        draws = (self._time_draws(batch), self._mask_draws(batch)) if uniforms is None else uniforms
        epsilon = self.options.time_epsilon
        time = epsilon + (1 - epsilon) * draws[0]  # [samples]
        return self._mask(batch, time, draws[1])

    def at(self, batch: Batch, time: float) -> Noised:
        """Mask tokens at one fixed noise level (held-out evaluation).

        Two models, or two runs, see the same masked tokens. So do two levels as far as they go (what is
        masked at the lower one is masked at the higher): give each level its own `stream_suffix` where
        their mean is wanted with less variance.
        """
        assert 0.0 <= time <= 1.0, f"a noise level lies in [0, 1], not at {time}"
        level = torch.full(batch.sample_ids.shape, time, dtype=torch.float32, device=batch.ids.device)
        return self._mask(batch, level, self._mask_draws(batch))

    def _time_draws(self, batch: Batch) -> Tensor:
        index = torch.zeros_like(batch.sample_ids)
        return uniforms(self.seed, batch.epochs, batch.sample_ids, TIME_STREAM + self.stream_suffix, index)

    def _mask_draws(self, batch: Batch) -> Tensor:
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        epoch, sample_id = batch.epochs[:, None], batch.sample_ids[:, None]
        return uniforms(self.seed, epoch, sample_id, MASK_STREAM + self.stream_suffix, position)

    def _mask(self, batch: Batch, time: Tensor, draws: Tensor) -> Noised:
        """Mask each maskable token whose draw is below 1 - alpha(t); pads and prompts never are."""
        probability = 1 - SCHEDULES[self.options.schedule].alpha(time)  # [samples]
        masked = (draws < probability[:, None]) & batch.maskable  # [samples, length]
        if self.whole_chunks_of:
            sides = [batch.sides[name] for name in self.whole_chunks_of]
            masked = mask_whole_chunks(masked, batch.maskable, sides)
        return Noised(batch=batch, time=time, masked=masked)
