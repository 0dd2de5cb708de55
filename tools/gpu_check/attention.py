"""FlexAttention as models call it: its values and gradients in bf16 beside whole masks in fp32, its speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu_check.rows import Place, Row, judged
from gpu_check.timing import milliseconds
from tide_megatron.diffusion.mask import Context, TwoViews
from tide_megatron.diffusion.segments import Segments
from tide_megatron.models.attention import make_dense
from tide_megatron.models.flex import CompiledFlex

HEADS, GROUPS, HEAD_DIM, SAMPLES = 16, 8, 128, 2
"""Qwen3-0.6B's."""
BLOCKS = Context(kind="block_diffusion", block_size=32)
BOTH = Context(kind="bidirectional")
VIEWS = TwoViews(kind="block_diffusion", block_size=32)
LIMITS = {"forward": 0.01, "backward": 0.02}
"""Relative errors in the Frobenius norm; bf16 keeps 8 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call: a context, the tokens of all its parts, and packs with pads that are hidden or not."""

    context: Context
    tokens: int
    has_packs: bool

    @property
    def length(self) -> int:
        """Of one part."""
        return self.tokens // self.context.parts

    @property
    def name(self) -> str:
        """For the table."""
        kind = "complementary" if self.context.noised_parts > 1 else self.context.kind
        return f"{kind} {self.tokens}" + (" in packs" if self.has_packs else "")


def shapes(*, small: bool) -> list[Shape]:
    """Return the calls that are checked; a rehearsal's are two and short."""
    sizes = [(BOTH, 1_024), (BLOCKS, 1_024), (BLOCKS, 1_088), (VIEWS, 1_536)]
    if small:
        return [
            Shape(context=BLOCKS, tokens=128, has_packs=False),
            Shape(context=VIEWS, tokens=192, has_packs=True),
        ]
    return [
        Shape(context=context, tokens=tokens, has_packs=has)
        for context, tokens in sizes
        for has in (False, True)
    ]


def check_kernels(place: Place) -> list[Row]:
    """Compare forward and backward of every shape; all run through one model's compiled FlexAttention."""
    device = torch.device(place.device)
    flex = _flex(place)
    rows = [_compared(flex, shape, device) for shape in shapes(small=place.is_rehearsal)]
    wanted = len(rows)
    how = "traced, without a code generator," if place.is_rehearsal else "compiled"
    text = f"{flex.compilations} graphs {how} for {wanted} shapes, none left uncompiled"
    faults = [] if flex.compilations == wanted else [f"{wanted} wanted"]
    return [*rows, judged("attention", text, faults, graphs=flex.compilations, shapes=wanted)]


def _flex(place: Place) -> CompiledFlex:
    """Return an attention as a model has it; a rehearsal traces it, and leaves code generation to the tests.

    On a CPU the first kernel takes Inductor and a C++ compiler most of a minute.
    """
    return CompiledFlex("the check", backend="eager" if place.is_rehearsal else "inductor")


def _compared(flex: CompiledFlex, shape: Shape, device: torch.device) -> Row:
    """Hold one shape's answer and gradients to a whole mask's in fp32."""
    segments = _segments(shape, device)
    parts = draw(shape, device)
    outer = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(9)).to(device)
    kernel = flex(shape.context, shape.length, segments, device)
    oracle = make_dense(shape.context, shape.length, segments, device)
    has_backward = device.type == "cuda"
    found, wanted = ([part.to(dtype) for part in parts] for dtype in (torch.bfloat16, torch.float32))
    ours = _differentiated(kernel, found, outer, has_backward=has_backward)
    theirs = _differentiated(oracle, wanted, outer, has_backward=has_backward)
    errors = [_relative(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    figures = {"forward": errors[0], "backward": max(errors[1:], default=None)}
    faults = [
        f"{name} differs by {figures[name]:.1e}, more than {limit}"
        for name, limit in LIMITS.items()
        if figures[name] is not None and not figures[name] <= limit
    ]
    backward = f"backward {figures['backward']:.1e}" if has_backward else "a CPU has no backward"
    text = f"{shape.name}: forward {errors[0]:.1e} from a whole mask in fp32, {backward}"
    return judged("attention", text, faults, shape=shape.name, **figures)


def draw(shape: Shape, device: torch.device) -> list[Tensor]:
    """Return query, key and value as bf16 holds them, fp32 [samples, heads or groups, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(SAMPLES, heads, shape.tokens, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(size, generator=generator).bfloat16().float().to(device) for size in sizes]


def _segments(shape: Shape, device: torch.device) -> Tensor | None:
    if not shape.has_packs:
        return None
    second = shape.length // 2 // shape.context.block_size * shape.context.block_size
    pack, start = torch.tensor([0, 0, 1]), torch.tensor([0, second, 0])
    tokens = torch.tensor([second - 3, shape.length - second, shape.length * 3 // 5])
    return Segments(pack=pack, start=start, tokens=tokens).numbers(SAMPLES, shape.length).to(device)


def _differentiated(
    kernel: Callable[..., Tensor], parts: list[Tensor], outer: Tensor, *, has_backward: bool
) -> list[Tensor]:
    """Return an answer and, where there is a backward pass, the gradients of query, key and value."""
    parts = [part.requires_grad_(has_backward) for part in parts]
    answer = kernel(*parts)
    if not has_backward:
        return [answer]
    return [answer, *torch.autograd.grad((answer.float() * outer).sum(), parts)]


def _relative(mine: Tensor, wanted: Tensor) -> float:
    return float((mine.detach().float() - wanted.detach()).norm() / wanted.detach().norm())


def check_speed(place: Place) -> list[Row]:
    """Time FlexAttention beside whole masks and beside no mask at all, forward alone and with backward."""
    device = torch.device(place.device)
    flex = _flex(place)
    return [_timed(flex, shape, device) for shape in shapes(small=place.is_rehearsal) if not shape.has_packs]


def _timed(flex: CompiledFlex, shape: Shape, device: torch.device) -> Row:
    """Time one shape."""
    has_backward = device.type == "cuda"
    parts = [part.bfloat16().requires_grad_(has_backward) for part in draw(shape, device)]
    outer = torch.randn_like(parts[0])
    ways: dict[str, Callable[..., Tensor]] = {
        "flex": flex(shape.context, shape.length, None, device),
        "whole mask": make_dense(shape.context, shape.length, None, device),
        "no mask": lambda query, key, value: scaled_dot_product_attention(query, key, value, enable_gqa=True),
    }
    figures: dict[str, Any] = {"shape": shape.name}
    for name, kernel in ways.items():
        figures[f"{name} ms"] = milliseconds(_without_gradient(kernel, parts), device, calls=10)
        if has_backward:
            figures[f"{name} both ms"] = milliseconds(_with_gradient(kernel, parts, outer), device, calls=10)
    told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if name != "shape")
    return Row(check="attention speed", text=f"{shape.name}, {SAMPLES} samples: {told}", figures=figures)


def _without_gradient(kernel: Callable[..., Tensor], parts: list[Tensor]) -> Callable[[], object]:
    def work() -> Tensor:
        with torch.no_grad():
            return kernel(*parts)

    return work


def _with_gradient(kernel: Callable[..., Tensor], parts: list[Tensor], outer: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(kernel(*parts), parts, outer)
