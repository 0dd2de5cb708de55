"""FP8 arithmetic against a table of the formats' numbers, and scales against a loop over blocks."""

import itertools
import math

import pytest
import torch

from tide_megatron.models import fp8
from tide_megatron.models.fp8 import (
    SCALINGS,
    Quantized,
    cast,
    factors_of,
    quantize,
    quantize_into,
    scale_shape,
)

BIAS = {"e4m3": (4, 3, 7, 448.0), "e5m2": (5, 2, 15, 57344.0)}
"""Bits of exponent and mantissa, the exponent's bias, the largest number (OCP 8-bit formats)."""
BLOCKS = {
    (name, part): getattr(scaling, part)
    for name, scaling in SCALINGS.items()
    for part in ("inputs", "weights")
}


def numbers(format):
    """List every positive finite number of a format, from its bits."""
    exponents, mantissas, bias, largest = BIAS[format]
    found = set()
    for exponent, mantissa in itertools.product(range(2**exponents), range(2**mantissas)):
        share = mantissa / 2**mantissas
        found.add(share * 2.0 ** (1 - bias) if not exponent else (1 + share) * 2.0 ** (exponent - bias))
    return torch.tensor(sorted(number for number in found if number <= largest), dtype=torch.float64)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_a_cast_gives_the_nearest_number_of_the_format_and_saturates(format):
    table = numbers(format)
    table = torch.cat([-table.flip(0), table[1:]])
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 4000)
    values = torch.cat([values, torch.tensor([0.0, 1e9, -1e9, math.inf, -math.inf])])
    found = cast(values, format).double()
    nearest = (table[None] - found[:, None].double()).abs().min(dim=1).values
    assert nearest.max() == 0.0
    wanted = (table[None] - values[:, None].double()).abs().min(dim=1).values
    inside = values.abs() <= table[-1]
    torch.testing.assert_close((found - values.double()).abs()[inside], wanted[inside], rtol=0, atol=0)
    assert set(found[~inside].abs().tolist()) == {float(table[-1])}
    assert cast(torch.tensor([math.nan]), format).isnan().all()


def by_loop(matrix, block, limit, is_power_of_two):
    """Quantise block by block in fp64; no format rounding: return scales and the largest scaled magnitude."""
    tall, wide = (size or length for size, length in zip(block, matrix.shape, strict=True))
    scales = []
    for top in range(0, matrix.shape[0], tall):
        for left in range(0, matrix.shape[1], wide):
            amax = float(matrix[top : top + tall, left : left + wide].double().abs().max())
            scale = amax / limit if amax else 1.0
            scales.append(2.0 ** math.ceil(math.log2(scale)) if is_power_of_two and amax else scale)
    return torch.tensor(scales, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 7), (256, 256), (130, 300), (1, 129)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "part"), BLOCKS, ids=str)
def test_every_block_has_its_own_scale_also_where_128_does_not_divide(name, part, dtype, shape):
    block, is_power = BLOCKS[name, part], SCALINGS[name].is_power_of_two
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    matrix[0] = 0  # a row of zeros
    matrix[:, :3] *= 50
    found = quantize(matrix, block, is_power_of_two=is_power)
    assert found.scale.shape == scale_shape(shape, block)
    wanted = by_loop(matrix, block, 448.0, is_power)
    torch.testing.assert_close(found.scale.double().flatten(), wanted, rtol=1e-6, atol=0)
    error = (found.dequantized() - matrix.float()).abs()
    step = fp8.spread(found.scale, block, matrix.shape)  # 2^-4 of a normal number, 2^-10 of a small one
    assert (error <= torch.maximum(matrix.float().abs() * 2**-4, step * 2**-10) * (1 + 1e-6)).all()
    assert not found.dequantized()[0].any()


@pytest.mark.parametrize(("name", "part"), BLOCKS, ids=str)
def test_what_is_no_number_stays_none_and_spoils_only_its_block(name, part):
    block, is_power = BLOCKS[name, part], SCALINGS[name].is_power_of_two
    for odd in (math.inf, -math.inf, math.nan):
        matrix = torch.ones(256, 256)
        matrix[200, 17] = odd
        lost = quantize(matrix, block, is_power_of_two=is_power).dequantized().isnan()
        rows, columns = (size or 256 for size in block)
        assert lost[200, 17]
        assert int(lost.sum()) == rows * columns
    tiny = quantize(torch.full((2, 3), 1e-44), block, is_power_of_two=is_power).dequantized()
    assert tiny.isfinite().all()


def test_powers_of_two_leave_room_and_never_more_than_a_factor_of_two():
    largest = torch.logspace(-30, 30, 200)
    factor = factors_of(largest, is_power_of_two=True)
    assert torch.equal(torch.exp2(factor.log2().round()), factor)
    assert ((factor * largest <= 448) & (factor * largest > 224)).all()


@pytest.mark.parametrize("shape", [(300, 200), (257, 129)], ids=str)
@pytest.mark.parametrize(("name", "part"), BLOCKS, ids=str)
def test_a_matrix_is_quantised_in_pieces_as_in_one(monkeypatch, name, part, shape):
    block, is_power = BLOCKS[name, part], SCALINGS[name].is_power_of_two
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    whole = quantize(matrix, block, is_power_of_two=is_power)
    room = Quantized(torch.empty_like(whole.data), torch.empty_like(whole.scale), block)
    monkeypatch.setattr(fp8, "CHUNK_ELEMENTS", 30_000)
    quantize_into(matrix, room, is_power_of_two=is_power)
    assert torch.equal(room.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert torch.equal(room.scale, whole.scale)


def test_nothing_quantises_to_nothing():
    for shape, (block, _) in itertools.product(((0, 64), (3, 0)), ((one, 0) for one in BLOCKS.values())):
        assert quantize(torch.zeros(shape), block).dequantized().shape == shape
