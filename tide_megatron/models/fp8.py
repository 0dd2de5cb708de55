"""FP8 arithmetic in plain torch: casts with a scale per tensor, row or block, and back. No model, no device.

A matrix is cut into blocks of equal shape; each block has one scale, so that its largest magnitude becomes
the largest number of the format. Magnitudes are looked for in fp32, casts saturate (torch's own turn what is
too large into NaN), a block of zeros keeps the scale 1, and a block with an infinity or NaN comes out as NaN:
what is no number must not look like one. The last blocks of a matrix that 128 does not divide are
smaller; nothing is padded.

Kernels: `torch._scaled_mm` multiplies rows (scales [rows, 1]), Transformer Engine's recipes
`Float8BlockScaling` (powers of two as it has them by default) and `Float8CurrentScaling` the other two.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

Format = Literal["e4m3", "e5m2"]
DTYPES: dict[Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None: all there are."""

CHUNK_ELEMENTS = 2**22
"""Of a matrix that are in fp32 at a time while it is quantised."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Which numbers of a product share a scale."""

    inputs: Block
    """Of activations [tokens, in]."""
    weights: Block
    """Of weights [out, in]."""
    is_power_of_two: bool = False
    """Whether scales are powers of two, so that scaling rounds nothing."""

    @property
    def spans_rows(self) -> bool:
        """Whether tokens share a scale, so that one row's answer depends on the others'."""
        return self.inputs[0] != 1


SCALINGS = {
    "rowwise": Scaling(inputs=(1, None), weights=(1, None)),
    "blockwise": Scaling(inputs=(1, 128), weights=(128, 128), is_power_of_two=True),
    "tensorwise": Scaling(inputs=(None, None), weights=(None, None)),
}


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix in 8 bits."""

    data: Tensor
    """[rows, columns] in a format of `DTYPES`."""
    scale: Tensor
    """What the numbers of a block are multiplied with, fp32 [blocks down, blocks across]."""
    block: Block

    def dequantized(self) -> Tensor:
        """Return the values, fp32 [rows, columns]."""
        return self.data.float() * spread(self.scale, self.block, self.data.shape)


def scale_shape(shape: torch.Size | tuple[int, ...], block: Block) -> tuple[int, int]:
    """Return how many scales a matrix of a shape has, down and across; at least one each way."""
    down, across = (size or length for size, length in zip(block, shape, strict=True))
    return max(1, -(-shape[0] // max(1, down))), max(1, -(-shape[1] // max(1, across)))


def spread(scale: Tensor, block: Block, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return scales in a shape that multiplies a matrix of `shape`: broadcast where blocks allow it."""
    for axis, (size, length) in enumerate(zip(block, shape, strict=True)):
        if scale.shape[axis] not in (1, length):
            assert size is not None, "a block of all rows or columns has one scale"
            scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, length)
    return scale


def largest(matrix: Tensor, block: Block) -> Tensor:
    """Return the largest magnitude of each block in fp32, 0 where there is nothing."""
    rows, columns = matrix.shape
    down, across = scale_shape(matrix.shape, block)
    if not matrix.numel():
        return matrix.new_zeros(down, across, dtype=torch.float32)
    tall, wide = (size or length for size, length in zip(block, matrix.shape, strict=True))
    magnitudes = matrix.abs()
    if down * tall != rows or across * wide != columns:
        magnitudes = torch.nn.functional.pad(magnitudes, (0, across * wide - columns, 0, down * tall - rows))
    return magnitudes.reshape(down, tall, across, wide).amax(dim=(1, 3)).float()


def factors_of(largest: Tensor, format: Format = "e4m3", *, is_power_of_two: bool = False) -> Tensor:
    """Return what each block is multiplied with before the cast, from its largest magnitude, both fp32.

    Its inverse is the block's scale. What is no finite number gets a factor that leaves none.
    """
    factor = (torch.finfo(DTYPES[format]).max / largest).clamp(max=torch.finfo(torch.float32).max)
    if is_power_of_two:
        # Of fp32's bits sign and mantissa go: the power of two at or below.
        factor = (factor.view(torch.int32) & 0x7F800000).view(torch.float32)
    factor = torch.where(largest == 0, torch.ones_like(factor), factor)
    return torch.where(largest.isfinite(), factor, torch.full_like(factor, torch.nan))


def cast(values: Tensor, format: Format = "e4m3") -> Tensor:
    """Round values to a format; what is too large becomes its largest number, NaN stays NaN."""
    limit = torch.finfo(DTYPES[format]).max
    return values.clamp(-limit, limit).to(DTYPES[format])


def quantize(
    matrix: Tensor, block: Block, format: Format = "e4m3", *, is_power_of_two: bool = False
) -> Quantized:
    """Quantise a matrix [rows, columns] of any floating dtype, on its device."""
    factor = factors_of(largest(matrix, block), format, is_power_of_two=is_power_of_two)
    data = cast(matrix.float() * spread(factor, block, matrix.shape), format)
    return Quantized(data, factor.reciprocal(), block)


@torch.no_grad()
def quantize_into(matrix: Tensor, into: Quantized, format: Format = "e4m3", *, is_power_of_two: bool) -> None:
    """Quantise a matrix into room that is there, some rows at a time: fp32 never holds much of it.

    Args:
        matrix: [rows, columns] of any floating dtype; it moves to the room's device as it is read.
        into: data and scales of its shape.
        format: of the data.
        is_power_of_two: see `Scaling`.
    """
    tall, columns = into.block[0], matrix.shape[1]
    factor = None
    if tall is None:  # all rows share their scales
        factor = factors_of(_largest_of_all(matrix, into.block), format, is_power_of_two=is_power_of_two)
        factor = factor.to(into.scale.device)
        into.scale.copy_(factor.reciprocal())
    step = max(1, CHUNK_ELEMENTS // max(1, columns) // (tall or 1)) * (tall or 1)
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step].to(into.data.device)
        stop = start + len(rows)
        if tall is None:
            assert factor is not None, "all rows share their scales"
            into.data[start:stop] = cast(rows.float() * spread(factor, into.block, rows.shape), format)
        else:
            part = quantize(rows, into.block, format, is_power_of_two=is_power_of_two)
            into.data[start:stop] = part.data
            into.scale[start // tall : -(-stop // tall)] = part.scale


def _largest_of_all(matrix: Tensor, block: Block) -> Tensor:
    """Return the largest magnitudes of blocks that are all rows high, without a copy of the matrix."""
    if block[1] is not None or not matrix.numel():
        return largest(matrix, block)
    low, high = matrix.aminmax()
    return torch.maximum(-low, high).float().reshape(1, 1)
