"""Attention under any mask: three kernels for one predicate, in megatron-core's core-attention slot.

Who may attend to whom is `diffusion.mask.may_attend`; everything here renders it (design section 7).
`dense` hands the whole bool mask to scaled-dot-product attention. `structured` cuts the sequence into chunks
and lets each query chunk see only the key chunks that the predicate allows at all, so that [x_t ; x_0] costs
about l^2 and not 4 l^2 (1.5-3 times faster on CPU); it knows no context kind, only the mask. `flex` is
FlexAttention with a BlockMask, for training on CUDA (`flex.py`). A test holds all of them equal.

An `AttentionPlan` is made once per view and shared by all layers: the kernel with its masks, and the rotary
angles of the view's own positions (positions restart in each part, which stock RoPE cannot know). It travels
as megatron-core's `attention_bias` argument: `attention_mask` is saved as a tensor by activation
recomputation, `attention_bias` is handed through untouched. The stock core attention is replaced because it
takes a global buffer, and Transformer Engine's because arbitrary masks disable its fast kernels.

A decoder brings its own kernel and, where it remembers keys and values, its `Memory` (`PassAttention`). Left
out: attention dropout (no model here has it).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tide_megatron.base.device_kind import kind_of
from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.diffusion.mask import Context, dense_mask
from tide_megatron.diffusion.views import View
from tide_megatron.models.flex import CompiledFlex, make_plain_flex

logger = logging.getLogger(__name__)

_SMALLEST_CHUNK = 32  # tokens; shorter chunks cost more in kernel launches than they save (measured on CPU)
_MOST_CHUNKS = 8  # per part; more save less than 1/8 of l^2


class Kernel(Protocol):
    """Attention of one view: query against key and value under the view's mask."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; all [samples, heads or groups, tokens, head_dim], the result shaped like `query`."""


class Memory(Protocol):
    """Keys and values of earlier passes, to which a pass adds its own."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Remember a layer's keys and values of this pass, and return all that its queries may see.

        Args:
            layer: number of the layer, from 1 on, as megatron-core counts.
            key: [tokens, samples, groups, head_dim], rotated.
            value: like `key`.

        Returns:
            Keys and values, [keys, samples, groups, head_dim].
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassAttention:
    """How a decoder's pass attends, in place of the model's own kernel."""

    kernel: Kernel
    memory: Memory | None = None
    """None: queries see the pass's own tokens only."""


class KernelMaker(Protocol):
    """One model's attention: makes the kernel of each view."""

    def __call__(
        self, context: Context, length: int, segments: Tensor | None, device: torch.device, /
    ) -> Kernel:
        """Make the kernel of a view: context, length of one part, its `numbers` or None, device."""

    def multiple(self, tokens: int) -> int:
        """Return of what number a view's tokens a sample should be a multiple, where it has so many."""


@dataclasses.dataclass(frozen=True)
class AnyLength:
    """A kernel maker that takes views of any length."""

    make: Callable[[Context, int, Tensor | None, torch.device], Kernel]

    def __call__(
        self, context: Context, length: int, segments: Tensor | None, device: torch.device
    ) -> Kernel:
        """Make the kernel of a view; see `KernelMaker`."""
        return self.make(context, length, segments, device)

    def multiple(self, tokens: int) -> int:
        """Return 1."""
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """One call with the whole mask."""

    mask: Tensor | None
    """[1 or samples, 1, S, S] bool; None: everybody sees everybody."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; see `Kernel`."""
        return _attend(query, key, value, self.mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structured:
    """One call per group of query chunks, each with the key chunks it may see at all."""

    sizes: tuple[int, ...]
    """Tokens of every chunk of the sequence, in order."""
    calls: tuple[tuple[tuple[int, ...], tuple[int, ...], Tensor | None], ...]
    """(query chunks, key chunks, mask between them); every chunk is queried in one call."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; see `Kernel`."""
        queries, keys, values = (torch.split(part, list(self.sizes), dim=2) for part in (query, key, value))
        answers: dict[int, Tensor] = {}
        for asking, seen, mask in self.calls:
            merged = _attend(
                torch.cat([queries[chunk] for chunk in asking], dim=2),
                torch.cat([keys[chunk] for chunk in seen], dim=2),
                torch.cat([values[chunk] for chunk in seen], dim=2),
                mask,
            )
            answers |= zip(
                asking, torch.split(merged, [self.sizes[chunk] for chunk in asking], dim=2), strict=True
            )
        return torch.cat([answers[chunk] for chunk in range(len(self.sizes))], dim=2)


def make_dense(context: Context, length: int, segments: Tensor | None, device: torch.device) -> Kernel:
    """Render the mask whole."""
    if segments is None:
        return _cached_dense(context, length, device)
    return Dense(mask=dense_mask(context, length, segments.to(device)))


def make_structured(context: Context, length: int, segments: Tensor | None, device: torch.device) -> Kernel:
    """Render the mask in chunks. Segments only hide, so the chunks are those of the mask without them."""
    if segments is None:
        return _cached_structured(context, length, device)
    plain = _cached_structured(context, length, device)
    masks = dense_mask(context, length, segments.to(device))
    calls = tuple(
        (asking, seen, _between(masks, plain.sizes, asking, seen)) for asking, seen, _ in plain.calls
    )
    return dataclasses.replace(plain, calls=calls)


KERNELS: dict[str, KernelMaker] = {
    "dense": AnyLength(make_dense),
    "structured": AnyLength(make_structured),
    "flex": AnyLength(make_plain_flex),
}
"""Word in a recipe -> how a view's kernel is made; on CUDA `flex` is compiled instead (`choose_kernel`)."""


def choose_kernel(wanted: str, device_type: str, *, trainable: bool, owner: str = "a model") -> KernelMaker:
    """Choose the attention kernel of one model, in this one place, and log it.

    Args:
        wanted: `auto` (flex on CUDA, structured on CPU) or a key of KERNELS.
        device_type: `cpu` or `cuda`.
        trainable: whether gradients are needed; FlexAttention has none on CPU.
        owner: whose attention it is, for the log.

    Raises:
        ConfigError: for an unknown word, or for training with flex on CPU.
    """
    name = ("flex" if device_type == "cuda" else "structured") if wanted == "auto" else wanted
    if name not in KERNELS:
        raise ConfigError(f"attention: {wanted!r} is unknown; {nearest(wanted, ('auto', *KERNELS))}")
    if name == "flex" and trainable and device_type != "cuda":
        raise ConfigError("attention: flex has no backward pass on CPU; use structured, dense or auto")
    logger.info("attention kernel: %s on %s%s", name, device_type, "" if wanted == name else f" ({wanted})")
    return CompiledFlex(owner) if name == "flex" and device_type == "cuda" else KERNELS[name]


def fit(view: View, make: KernelMaker) -> View:
    """Return a view padded to a length that a model's kernel wants; what real tokens see stays the same.

    All stages of a model must read views of one shape, so whoever tells them the shape fits the views first.
    """
    return view.rounded(make.multiple(view.ids.shape[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """What all layers of one forward pass share."""

    kernel: Kernel
    cosine: Tensor
    """[tokens, samples or 1, 1, rotated / 2] in the model's dtype."""
    sine: Tensor
    rows: Tensor
    """[rows or 1] int64: the view's rows in megatron-core's order, position before sample. One row stands in
    where the view asks for none: megatron-core's router cannot reshape nothing."""
    memory: Memory | None = None

    @classmethod
    def of(cls, view: View, reading: PassAttention, frequencies: Tensor, dtype: torch.dtype) -> AttentionPlan:
        """Make the plan of a view.

        Args:
            view: positions and rows.
            reading: how it attends.
            frequencies: [rotated / 2] fp32 from `rotary_frequencies`.
            dtype: of query and key.
        """
        # A plain view repeats one row of positions without storing it; one row of angles is enough then.
        shared = view.positions.stride(0) == 0
        positions = view.positions[:1] if shared else view.positions
        samples, tokens = view.ids.shape
        rows = view.rows if len(view.rows) else view.rows.new_zeros(1)
        angles = positions.T[:, :, None, None].to(frequencies.dtype) * frequencies
        return cls(
            kernel=reading.kernel,
            cosine=angles.cos().to(dtype),
            sine=angles.sin().to(dtype),
            rows=rows % tokens * samples + rows // tokens,
            memory=reading.memory,
        )

    def pick(self, states: Tensor) -> Tensor:
        """Return the states the view asks for: [tokens, samples, hidden] -> [rows, 1, hidden]."""
        return states.flatten(0, 1).index_select(0, self.rows)[:, None]

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate the first dimensions of each head, halves style: [tokens, samples, heads, head_dim]."""
        half = self.cosine.shape[-1]
        first, second, rest = torch.split(heads, [half, half, heads.shape[-1] - 2 * half], dim=-1)
        turned = [first * self.cosine - second * self.sine, second * self.cosine + first * self.sine]
        return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)


def rotary_frequencies(rotary_dim: int, base: float, device: torch.device) -> Tensor:
    """Return the angle per position of each pair of dimensions, [rotary_dim / 2] fp32 (spec section 6)."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    return 1.0 / base**exponents


class PlannedAttention(torch.nn.Module):
    """Core attention in megatron-core's slot: rotate, attend as planned, merge the heads."""

    def __init__(self, **kwargs: Any) -> None:
        """Take the layer's number; the plan says what else megatron-core tells every core attention."""
        super().__init__()
        self.layer_number: int = kwargs["layer_number"]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        attention_bias: AttentionPlan,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [tokens, samples, heads, head_dim].
            key: [tokens, samples, groups, head_dim].
            value: like `key`.
            attention_mask: unused.
            attention_bias: the plan of this forward pass.
            kwargs: what else a megatron-core release passes.

        Returns:
            [tokens, samples, heads * head_dim].
        """
        plan = attention_bias
        key = plan.rotate(key)
        if plan.memory is not None:
            key, value = plan.memory.extend(self.layer_number, key, value)
        parts = (part.permute(1, 2, 0, 3) for part in (plan.rotate(query), key, value))
        answer = plan.kernel(*parts)  # [samples, heads, tokens, head_dim]
        return answer.permute(2, 0, 1, 3).flatten(2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    if query.dtype is torch.bfloat16 and kind_of(query.device) == "cpu":
        return _attend_by_products(query, key, value, mask)
    if query.is_meta:
        return _attend_without_numbers(query, key, value, mask)
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def _attend_without_numbers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend in a plan by the kernel that torch takes on CPU: on meta it would keep every score instead."""
    if mask is not None:
        mask = torch.empty(mask.shape, dtype=query.dtype, device=query.device)  # torch adds it to the scores
    answer: Tensor
    answer, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)
    return answer


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by two matrix products: torch's own bf16 backward on CPU takes 2-3 times as long (measured)."""
    samples, heads, tokens, head_dim = query.shape
    groups = key.shape[1]
    stacked = (
        query.reshape(samples, groups, -1, head_dim) * head_dim**-0.5
    )  # a group's heads under each other
    scores = (stacked @ key.transpose(-1, -2)).view(samples, heads, tokens, -1)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).view(samples, groups, -1, scores.shape[-1])
    answer: Tensor = (weights @ value).view(query.shape)
    return answer


@functools.lru_cache(maxsize=32)
def _cached_dense(context: Context, length: int, device: torch.device) -> Dense:
    return Dense(mask=_unless_full(dense_mask(context, length).to(device)))


@functools.lru_cache(maxsize=32)
def _cached_structured(context: Context, length: int, device: torch.device) -> Structured:
    """Cut each part into equal chunks of whole blocks; the same chunk of several parts is queried together.

    Together are the clean part and one noised part, which see nearly the same; a further noised part would
    only get the other one's keys and have them masked, so it is asked alone.
    """
    mask = dense_mask(context, length)
    block = length if context.kind == "bidirectional" else context.block_size
    chunk = block * -(-max(_SMALLEST_CHUNK, -(-length // _MOST_CHUNKS)) // block)
    own = [min(chunk, length - start) for start in range(0, length, chunk)]
    sizes = tuple(own * context.parts)
    calls = []
    alone = context.noised_parts - 1
    parts = [(part,) for part in range(alone)] + [tuple(range(alone, context.parts))]
    for first, together in itertools.product(range(len(own)), parts):
        asking = tuple(first + part * len(own) for part in together)
        seen = tuple(c for c in range(len(sizes)) if bool(_between(mask, sizes, asking, (c,)).any()))
        calls.append((asking, seen, _unless_full(_between(mask, sizes, asking, seen).to(device))))
    return Structured(sizes=sizes, calls=tuple(calls))


def _between(mask: Tensor, sizes: tuple[int, ...], asking: tuple[int, ...], seen: tuple[int, ...]) -> Tensor:
    """Return the part of a mask [..., S, S] between some query chunks and some key chunks."""
    rows = torch.cat([torch.split(mask, list(sizes), dim=-2)[chunk] for chunk in asking], dim=-2)
    return torch.cat([torch.split(rows, list(sizes), dim=-1)[chunk] for chunk in seen], dim=-1)


def _unless_full(mask: Tensor) -> Tensor | None:
    """Return None for a mask that allows everything: attention without a mask is faster."""
    return None if bool(mask.all()) else mask
