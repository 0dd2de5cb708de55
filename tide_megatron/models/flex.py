"""FlexAttention: the same predicate as a BlockMask, compiled one kernel a shape, and never left uncompiled.

Uncompiled, FlexAttention materialises every score of every head. torch.compile falls back to that without a
word once one function has been compiled for more shapes than dynamo's limit (8). So every model has a
`CompiledFlex` of its own, with ONE compiled function for each shape. Each function has a code object of its
own, because dynamo's cache and limit hang on that (torch 2.11 and 2.13), and `fullgraph`, under which dynamo
raises at its limit. How many shapes there may be is our own number; beyond it a run ends with a message. No
setting of dynamo is touched.

Shapes are static (`dynamic=False`): a kernel that knows its lengths needs no guards on them and is what
FlexAttention is tuned for, and `attention.fit` rounds the views' lengths so that few shapes occur.

On CPU a `CompiledFlex` runs forward only, and takes a C++ compiler: tests do that. A model on CPU that asks
for `flex` gets `make_plain_flex`, uncompiled, to compare with.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tide_megatron.base.errors import TideError
from tide_megatron.diffusion.mask import Context, dense_mask, may_attend

log = logging.getLogger(__name__)

BLOCK = 128
"""Tokens of FlexAttention's blocks: it skips or fills whole ones, and wants sequences of whole ones."""
MOST_KERNELS = 64
"""Most graphs of one model. Each costs seconds to compile; a run that needs more should fix its length."""

_LENGTHS_AN_OCTAVE = 8
"""At most so many lengths occur between one power of two and the next: a microbatch has an eighth more pads
at worst (a sixteenth on average), and lengths up to 8,192 tokens need 32 kernels, not 64."""

Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""(query, key, value, block mask) -> answer, in the shapes of `attention.Kernel`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flex:
    """Attention of one view under a BlockMask; an `attention.Kernel`."""

    block_mask: Any
    attend: Attend

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; see `attention.Kernel`."""
        return self.attend(query, key, value, self.block_mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelKey:
    """Cache key of a compiled kernel: all that it is compiled for."""

    context: Context
    length: int
    """Of one part."""
    has_segments: bool
    """Whether pads and other samples are hidden, by numbers that differ from view to view."""
    query: tuple[int, ...]
    """[samples, heads, tokens, head_dim]."""
    groups: int
    """Key-value heads."""
    dtype: torch.dtype
    device: torch.device
    has_gradient: bool

    def __str__(self) -> str:
        """Say it for the log."""
        samples, heads, tokens, head_dim = self.query
        return (
            f"{samples} x {tokens} tokens, {heads} heads over {self.groups} of {head_dim} in "
            f"{str(self.dtype).removeprefix('torch.')}, {self.context.kind} ({self.context.parts} part(s), "
            f"block {self.context.block_size}), {'with' if self.has_segments else 'no'} segments, "
            f"{'with' if self.has_gradient else 'no'} gradient"
        )


class CompiledFlex:
    """One model's compiled FlexAttention; an `attention.KernelMaker`."""

    def __init__(self, owner: str, *, most_kernels: int = MOST_KERNELS, backend: str = "inductor") -> None:
        """Start with nothing compiled.

        Args:
            owner: whose attention it is, for the log.
            most_kernels: so many may be compiled.
            backend: torch.compile's.
        """
        self.compilations = 0
        """Graphs that were compiled so far, for all shapes: what a check reads."""
        self._owner, self._most_kernels, self._backend = owner, most_kernels, backend
        self._kernels: dict[KernelKey, Attend] = {}

    def __call__(self, context: Context, length: int, segments: Tensor | None, device: torch.device) -> Flex:
        """Make the kernel of a view; see `attention.KernelMaker`."""
        attend = functools.partial(self._attend, context, length, segments is not None)
        return Flex(block_mask=block_mask(context, length, segments, device), attend=attend)

    def multiple(self, tokens: int) -> int:
        """Return a block, or for longer views an eighth of the power of two below them: few shapes occur."""
        octave = 1 << max(0, tokens - 1).bit_length()  # the next power of two
        return max(BLOCK, octave // 2 // _LENGTHS_AN_OCTAVE)

    def _attend(
        self,
        context: Context,
        length: int,
        has_segments: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
    ) -> Tensor:
        """Attend by the kernel of this shape, which is compiled when it is met first.

        Raises:
            TideError: when more are needed than there may be, or torch leaves one uncompiled.
        """
        shape = KernelKey(
            context=context,
            length=length,
            has_segments=has_segments,
            query=tuple(query.shape),
            groups=key.shape[1],
            dtype=query.dtype,
            device=query.device,
            has_gradient=torch.is_grad_enabled() and query.requires_grad,
        )
        if shape in self._kernels:
            return self._run(shape, query, key, value, mask)
        if self.compilations >= self._most_kernels:
            raise TideError(self._too_many())
        self._kernels[shape] = self._compiled(shape)
        before = self.compilations
        try:
            answer = self._run(shape, query, key, value, mask)
        except RuntimeError as fault:
            if self.compilations > before or type(fault) is not RuntimeError:
                raise
            raise TideError(self._uncompiled()) from fault  # newer releases of torch notice it themselves
        if self.compilations == before:
            raise TideError(self._uncompiled())
        return answer

    def _run(self, shape: KernelKey, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        from torch._dynamo.exc import FailOnRecompileLimitHit  # dynamo takes seconds to import

        try:
            return self._kernels[shape](query, key, value, mask)
        except FailOnRecompileLimitHit:
            raise TideError(self._too_many()) from None

    def _uncompiled(self) -> str:
        return (
            f"attention: torch.compile left FlexAttention of {self._owner} uncompiled, which would keep "
            "every score; unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or use attention=dense"
        )

    def _too_many(self) -> str:
        return (
            f"attention: FlexAttention of {self._owner} was compiled {self.compilations} times and meets one "
            "more shape; set data.fixed_length, prepare records of fewer lengths, or use attention=dense"
        )

    def _compiled(self, shape: KernelKey) -> Attend:
        """Return a function of its own for a shape; it is compiled at its first call, which is logged."""
        from torch._dynamo import lookup_backend
        from torch.nn.attention.flex_attention import flex_attention

        compile_graph = lookup_backend(self._backend)

        def backend(graph: Any, inputs: Any) -> Any:
            self.compilations += 1
            log.info(
                "attention of %s: compiling FlexAttention, graph %d: %s",
                self._owner,
                self.compilations,
                shape,
            )
            return compile_graph(graph, inputs)

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
            answer: Tensor = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
            return answer

        # All functions of one `def` share a code object, and so dynamo's cache and limit; a copy has its own.
        own = types.FunctionType(
            attend.__code__.replace(), attend.__globals__, attend.__name__, None, attend.__closure__
        )
        compiled: Attend = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
        return compiled


def make_plain_flex(context: Context, length: int, segments: Tensor | None, device: torch.device) -> Flex:
    """Make an uncompiled kernel, which keeps every score: on CPU only, forward only, to compare with."""
    assert device.type == "cpu", "on CUDA FlexAttention is compiled: see choose_kernel"
    return Flex(block_mask=block_mask(context, length, segments, device), attend=_attend_uncompiled)


def _attend_uncompiled(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention  # imports dynamo: seconds, only where used

    answer: Tensor = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    return answer


def block_mask(context: Context, length: int, segments: Tensor | None, device: torch.device) -> Any:
    """Render the predicate as a BlockMask, by the same rule as `dense_mask`.

    With segments, only blocks are worked on and nothing of the size [S, S]: what the context alone says of a
    block is known, and a block is seen in full where it was and both its sides are of one segment. Segments
    of a block are taken for all numbers between the least and the greatest of them: what that lets through
    wrongly the rule itself hides.

    Args:
        context: kind and block size.
        length: tokens of one part.
        segments: [samples, length] int64 (`Segments.numbers`); None: all are of one, pads too.
        device: where to.
    """
    if segments is None:
        return _whole(context, length, device)
    from torch.nn.attention.flex_attention import BlockMask

    own = segments.to(device).repeat(1, context.parts)  # [samples, S]

    def allowed(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mine, other = own[sample, query], own[sample, key]
        seen = may_attend(context, length, query, key) & (mine >= 0) & (mine == other)
        return seen | ((mine < 0) & (query == key))

    some, every = _blocks(context, length, device)  # [blocks, blocks]
    size = context.parts * length
    blocks = torch.nn.functional.pad(own, (0, len(some) * BLOCK - size), value=-1).view(len(own), -1, BLOCK)
    is_real, most = blocks >= 0, blocks.amax(-1)  # [samples, blocks]
    least = blocks.where(is_real, len(own) * length).amin(-1)  # of a block of pads: above all
    meet = (least[:, :, None] <= most[:, None, :]) & (least[:, None, :] <= most[:, :, None])
    alone = is_real.all(-1) & (least == most)
    itself = torch.eye(len(some), dtype=torch.bool, device=device) & ~is_real.all(-1)[:, :, None]
    full = every & alone[:, :, None] & alone[:, None, :] & (least[:, :, None] == least[:, None, :])
    mixed = ((some & meet) | itself) & ~full
    return BlockMask.from_kv_blocks(
        *_listed(mixed), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(size, size)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return [samples, 1, blocks] how many key blocks each query block has, and which, those first."""
    numbers = blocks.to(torch.int32)
    order = numbers.argsort(dim=-1, descending=True, stable=True)
    return numbers.sum(-1).to(torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


@functools.lru_cache(maxsize=64)
def _blocks(context: Context, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Say of each pair of blocks whether some, and whether every query sees a key, without padding."""
    mask = dense_mask(context, length)[0, 0]
    missing = -len(mask) % BLOCK
    mask = torch.nn.functional.pad(mask, (0, missing, 0, missing))
    blocks = len(mask) // BLOCK
    tiles = mask.view(blocks, BLOCK, blocks, BLOCK).transpose(1, 2).flatten(2)
    return tiles.any(-1).to(device), tiles.all(-1).to(device)


@functools.lru_cache(maxsize=64)
def _whole(context: Context, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(context, length, query, key)

    size = context.parts * length
    return create_block_mask(allowed, None, None, size, size, device=str(device))
