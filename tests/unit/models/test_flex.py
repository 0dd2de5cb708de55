"""FlexAttention is compiled, one graph a shape, counted and logged; where it is not, a run ends by name.

Most tests let dynamo trace and leave the kernel to torch's eager form, which takes seconds; what the C++
compiler makes of it is compared as well.
"""

import dataclasses
import logging
import shutil

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tests.segments import numbers_of
from tests.unit.models.shapes import DENSE, MIXTURE, build, view
from tide_megatron.base.errors import TideError
from tide_megatron.diffusion.mask import Context, TwoViews
from tide_megatron.models.attention import KERNELS, choose_kernel, fit, make_dense
from tide_megatron.models.flex import CompiledFlex

CPU = torch.device("cpu")
PAIR = Context(kind="block_diffusion", block_size=16)
ALL = Context(kind="bidirectional")
TWO = TwoViews(kind="block_diffusion", block_size=16)


def parts_of(context, length, samples=2, heads=4, head_dim=16):
    draw = torch.Generator().manual_seed(length)
    shapes = [(samples, heads, context.parts * length, head_dim)]
    shapes += 2 * [(samples, heads // 2, context.parts * length, head_dim)]
    return [torch.randn(shape, generator=draw) for shape in shapes]


@torch.no_grad()
def check(make, context, length, lengths=None, samples=2):
    """Attend as dense attention does."""
    parts = parts_of(context, length, samples)
    real = None if lengths is None else numbers_of(torch.tensor(lengths), length)
    found = make(context, length, real, CPU)(*parts)
    expected = make_dense(context, length, real, CPU)(*parts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_every_shape_is_one_graph_and_one_line(caplog):
    make = CompiledFlex("a2d-qwen3", backend="eager")
    with caplog.at_level(logging.INFO):
        check(make, PAIR, 64)
        check(make, PAIR, 64)
        assert make.compilations == 1
        check(make, ALL, 128, (128, 70))
        check(make, ALL, 128, (3, 128))  # other lengths, another mask: the same graph
        assert make.compilations == 2
        check(make, ALL, 128)
        check(make, PAIR, 64, samples=3)
        check(make, TWO, 128)
        assert make.compilations == 5
    lines = [line for line in caplog.messages if "compiling FlexAttention" in line]
    assert len(lines) == 5
    assert lines[0] == (
        "attention of a2d-qwen3: compiling FlexAttention, graph 1: 2 x 128 tokens, 4 heads over 2 of 16 in "
        "float32, block_diffusion (2 part(s), block 16), no segments, no gradient"
    )
    assert "bidirectional (1 part(s), block 32), with segments" in lines[1]


def by_dense(query, key, value, *, block_mask, enable_gqa):
    """Stand in for FlexAttention, which has no gradient on CPU."""
    return scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa)


def test_a_gradient_is_another_graph(monkeypatch):
    monkeypatch.setattr(flex_attention, "flex_attention", by_dense)
    make = CompiledFlex("m", backend="eager")
    parts = parts_of(PAIR, 64)
    kernel = make(PAIR, 64, None, CPU)
    trained = [part.clone().requires_grad_() for part in parts]
    for given in (parts, trained, parts, trained):
        kernel(*given)
    assert make.compilations == 2


def test_many_shapes_are_all_compiled_and_models_do_not_share_a_limit(monkeypatch):
    """Dynamo's own limit is 8 shapes a code object."""
    monkeypatch.setattr(flex_attention, "flex_attention", by_dense)
    for owner, shapes in (("one", 9), ("other", 1)):
        make = CompiledFlex(owner, backend="eager")
        for number in range(1, shapes + 1):
            check(make, ALL, 128 * number, samples=1)
        assert make.compilations == shapes


def test_one_shape_too_many_ends_the_run(monkeypatch):
    monkeypatch.setattr(flex_attention, "flex_attention", by_dense)
    make = CompiledFlex("llada2_moe", backend="eager", most_kernels=2)
    check(make, ALL, 128)
    check(make, ALL, 256)
    with pytest.raises(
        TideError,
        match=r"^attention: FlexAttention of llada2_moe was compiled 2 times and meets one more shape; set "
        r"data\.fixed_length, .*, or use attention=dense$",
    ):
        check(make, ALL, 384)
    check(make, ALL, 128)
    assert make.compilations == 2


def test_what_dynamo_refuses_to_compile_again_ends_the_run():
    """Where a graph does not serve what it was kept for, dynamo's own limit holds; it must not fall back."""
    make = CompiledFlex("m", backend="eager")
    check(make, PAIR, 64)
    query, key, value = parts_of(PAIR, 64)
    turned = value.transpose(2, 3).contiguous().transpose(2, 3)  # the same numbers in other places
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        torch.no_grad(),
        pytest.raises(TideError, match="was compiled 1 times and meets one more shape"),
    ):
        make(PAIR, 64, None, CPU)(query, key, turned)


def complaining(function, **options):
    """Stand in for torch.compile where it is switched off, in releases that notice."""

    def call(*args):
        raise RuntimeError("torch.compile with fullgraph=True found no compiled frames.")

    return call


@pytest.mark.parametrize("switched_off", [lambda function, **options: function, complaining])
def test_flex_that_is_not_compiled_ends_the_run(monkeypatch, switched_off):
    monkeypatch.setattr(torch, "compile", switched_off)
    monkeypatch.setattr(flex_attention, "flex_attention", by_dense)
    with pytest.raises(TideError, match=r"^attention: torch\.compile left FlexAttention of m uncompiled"):
        check(CompiledFlex("m"), PAIR, 64)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.slow
def test_compiled_kernels_are_dense_attention():
    make = CompiledFlex("m")
    for context, length, lengths in (
        (PAIR, 64, None),
        (ALL, 128, (128, 70)),
        (ALL, 128, (5, 127)),
        (TWO, 128, None),
    ):
        check(make, context, length, lengths)
    assert make.compilations == 3


def test_every_model_on_cuda_has_compiled_flex_of_its_own():
    first, second = (choose_kernel("auto", "cuda", trainable=True, owner=name) for name in ("a", "b"))
    assert isinstance(first, CompiledFlex)
    assert isinstance(second, CompiledFlex)
    assert first is not second
    assert choose_kernel("flex", "cpu", trainable=False) is KERNELS["flex"]


@pytest.mark.parametrize(
    ("kind", "length", "lengths"),
    [
        ("block_diffusion", 40, None),
        ("block_diffusion", 43, None),  # a block that is not full
        ("block_causal", 130, None),
        ("block_diffusion", 40, (40, 17)),
        ("bidirectional", 40, None),
        ("bidirectional", 140, (99, 140)),
        ("block_diffusion", 64, None),
    ],
)
@pytest.mark.parametrize("config", [DENSE, MIXTURE])
@torch.no_grad()
def test_a_models_numbers_do_not_change_by_rounding(groups, config, kind, length, lengths):
    real = None if lengths is None else torch.tensor(lengths)
    seen = view(config["vocab_size"], length=length, kind=kind, lengths=real)
    if lengths is not None:  # what a padded position answers means nothing
        inside = torch.arange(seen.ids.shape[1]) % length < real[:, None]
        seen = dataclasses.replace(seen, rows=inside.flatten().nonzero().flatten())
    model = build(config, groups, attention="dense")
    expected = model.rows(seen)
    model.make_kernel = make = CompiledFlex("m", backend="eager")
    torch.testing.assert_close(model.rows(seen), expected, rtol=1e-5, atol=2e-6)
    assert make.compilations == 1, "all layers share it"
    rounded = fit(seen, make)
    assert rounded.ids.shape[1] % 128 == 0
    assert fit(rounded, make) is rounded


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_few_numbers_of_tokens_occur(parts):
    found, multiple_of = set(), CompiledFlex("m").multiple
    for length in range(1, 8192 // parts):
        multiple = multiple_of(parts * length)
        step = multiple if parts == 3 else multiple // parts
        rounded = -(-length // step) * step
        tokens = parts * rounded
        assert tokens % 128 == 0
        assert tokens - parts * length < parts * step
        assert rounded % (multiple_of(tokens) if parts == 3 else multiple_of(tokens) // parts) == 0, (
            "a stage would move"
        )
        found.add(tokens)
    assert len(found) <= 33
