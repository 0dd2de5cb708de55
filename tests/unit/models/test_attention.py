"""Attention: every kernel renders the same predicate, positions are honoured, nothing leaks."""

import dataclasses
import logging

import pytest
import torch

from tests.segments import numbers_of
from tests.unit.models.shapes import DENSE, build, view
from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.mask import Context, TwoViews, dense_mask
from tide_megatron.models.attention import (
    KERNELS,
    AttentionPlan,
    Dense,
    PassAttention,
    Structured,
    choose_kernel,
    make_dense,
    make_structured,
    rotary_frequencies,
)
from tide_megatron.models.flex import CompiledFlex

CPU = torch.device("cpu")
CASES = [
    (kind, length, block, shares)
    for kind in ("bidirectional", "block_causal", "block_diffusion")
    for length, block in ((96, 16), (80, 48), (70, 4), (13, 32), (170, 8))
    for shares in (None, (1.0, 0.6, 0.02))
]


def heads(tokens, seed=0, samples=3, num_heads=4, groups=2, head_dim=8):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(samples, num_heads, tokens, head_dim)] + 2 * [(samples, groups, tokens, head_dim)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def written_out(query, key, value, mask):
    """Attention without any kernel: scores, mask, softmax, sum."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value


def segments_of(shares, length):
    """Return the numbers of segments of rows of these shares of a length, as masks read them."""
    if shares is None:
        return None
    return numbers_of(torch.tensor([max(1, int(share * length)) for share in shares]), length)


@pytest.mark.parametrize(("kind", "length", "block", "shares"), CASES)
def test_dense_and_structured_agree_with_gradients(kind, length, block, shares):
    context, segments = Context(kind=kind, block_size=block), segments_of(shares, length)
    parts = heads(context.parts * length)
    outer = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(9))
    found = {}
    for name, attend in {
        "written out": lambda *p: written_out(*p, dense_mask(context, length, segments)),
        "dense": make_dense(context, length, segments, CPU),
        "structured": make_structured(context, length, segments, CPU),
    }.items():
        answer = attend(*parts)
        found[name] = (answer, *torch.autograd.grad((answer * outer).sum(), parts))
    for name in ("dense", "structured"):
        for ours, expected in zip(found[name], found["written out"], strict=True):
            assert torch.isfinite(ours).all(), "padded rows must stay finite"
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shares", [None, (1.0, 0.6, 0.02)])
@pytest.mark.parametrize(("length", "block"), [(96, 16), (70, 4), (13, 32)])
def test_all_kernels_render_two_views_beside_one_clean_part(length, block, shares):
    context, segments = TwoViews(kind="block_diffusion", block_size=block), segments_of(shares, length)
    parts = [part.detach() for part in heads(3 * length)]
    expected = written_out(*parts, dense_mask(context, length, segments))
    for name in ("dense", "structured", "flex"):
        found = KERNELS[name](context, length, segments, CPU)(*parts)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    alone = Context(kind="block_diffusion", block_size=block)
    for first in (0, length):  # each noised part with the clean one is the ordinary context
        own = torch.cat([torch.arange(first, first + length), torch.arange(2 * length, 3 * length)])
        alike = written_out(*(part[:, :, own] for part in parts), dense_mask(alone, length, segments))
        torch.testing.assert_close(expected[:, :, own], alike, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("kind", "length", "block", "shares"), CASES[1::3])
@pytest.mark.parametrize("name", ["dense", "structured"])
def test_bf16_stays_near_fp32_with_gradients(name, kind, length, block, shares):
    context, segments = Context(kind=kind, block_size=block), segments_of(shares, length)
    exact = heads(context.parts * length)
    rounded = [part.detach().bfloat16().requires_grad_() for part in exact]
    attend = KERNELS[name](context, length, segments, CPU)
    results = []
    for parts in (exact, rounded):
        answer = attend(*parts)
        results.append((answer, *torch.autograd.grad(answer.square().sum(), parts)))
    for expected, ours in zip(*results, strict=True):
        assert ours.dtype is torch.bfloat16
        assert (ours.float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize(("kind", "length", "block", "shares"), CASES[::3])
def test_flex_agrees_forward(kind, length, block, shares):
    context, segments = Context(kind=kind, block_size=block), segments_of(shares, length)
    parts = [part.detach() for part in heads(context.parts * length)]
    flex = KERNELS["flex"](context, length, segments, CPU)
    expected = written_out(*parts, dense_mask(context, length, segments))
    torch.testing.assert_close(flex(*parts), expected, rtol=1e-5, atol=2e-6)


def test_structured_skips_what_nobody_sees():
    context = Context(kind="block_diffusion", block_size=32)
    kernel = make_structured(context, 256, None, CPU)
    assert isinstance(kernel, Structured)
    work = sum(
        sum(kernel.sizes[c] for c in asked) * sum(kernel.sizes[c] for c in seen)
        for asked, seen, _ in kernel.calls
    )
    assert sorted(chunk for asked, _, _ in kernel.calls for chunk in asked) == list(range(len(kernel.sizes)))
    assert work < 0.36 * 512**2, "all 2l x 2l pairs were computed"


def test_everybody_to_everybody_needs_no_mask():
    for name in ("dense", "structured"):
        kernel = KERNELS[name](Context(kind="bidirectional"), 40, None, CPU)
        assert (kernel.mask if name == "dense" else kernel.calls[0][2]) is None


def test_masks_are_made_once():
    context = Context(kind="block_causal", block_size=4)
    assert make_structured(context, 50, None, CPU) is make_structured(context, 50, None, CPU)
    assert make_dense(context, 50, None, CPU) is make_dense(context, 50, None, CPU)


def test_kernel_choice_is_logged_and_checked(caplog):
    with caplog.at_level(logging.INFO):
        assert isinstance(choose_kernel("auto", "cuda", trainable=True), CompiledFlex)
        assert choose_kernel("auto", "cpu", trainable=True) is KERNELS["structured"]
    assert "flex on cuda (auto)" in caplog.text
    assert "structured on cpu (auto)" in caplog.text
    assert choose_kernel("flex", "cpu", trainable=False) is KERNELS["flex"]
    with pytest.raises(ConfigError, match="no backward pass on CPU"):
        choose_kernel("flex", "cpu", trainable=True)
    with pytest.raises(ConfigError, match="did you mean 'structured'"):
        choose_kernel("structurd", "cpu", trainable=True)


def rotated_by_complex_numbers(x, positions, rotary_dim, base):
    """The same rotation written with complex multiplication."""
    half = rotary_dim // 2
    turned = torch.complex(x[..., :half], x[..., half:rotary_dim]).to(torch.complex128)
    angles = positions.T.double()[:, :, None, None] * base ** (-torch.arange(half).double() / half)
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real.float(), turned.imag.float(), x[..., rotary_dim:]], dim=-1)


@pytest.mark.parametrize("rotary_dim", [8, 16])
@pytest.mark.parametrize("own", [False, True])
def test_rotation_follows_the_views_positions(rotary_dim, own):
    seen = view(50, samples=3, length=10)
    if own:
        shifted = torch.randint(0, 100, seen.ids.shape, generator=torch.Generator().manual_seed(3))
        seen = dataclasses.replace(seen, positions=shifted)
    x = torch.randn(20, 3, 2, 16)
    reading = PassAttention(kernel=Dense(mask=None))
    plan = AttentionPlan.of(seen, reading, rotary_frequencies(rotary_dim, 1e4, CPU), torch.float32)
    assert plan.cosine.shape[1] == (3 if own else 1), "a shared row of positions is computed once"
    expected = rotated_by_complex_numbers(x, seen.positions, rotary_dim, 1e4)
    torch.testing.assert_close(plan.rotate(x), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["dense", "structured", "flex"])
def test_a_model_sees_only_what_it_may(groups, attention):
    """Change one token at a time; exactly the positions that may attend to it (in two layers) move."""
    model = build(DENSE, groups, attention=attention)
    seen = view(61, samples=1, length=40, block_size=8)
    reach = dense_mask(seen.context, seen.length)[0, 0]
    reach = (reach.float() @ reach.float()) > 0
    with torch.no_grad():
        before = model.rows(seen)
        for position in range(0, 80, 7):
            ids = seen.ids.clone()
            ids[0, position] = (ids[0, position] + 1) % 61
            after = model.rows(dataclasses.replace(seen, ids=ids))
            moved = (after - before).abs().amax(dim=-1) > 1e-7
            assert torch.equal(moved, reach[:, position]), f"token {position}"


def test_padding_changes_nothing(groups):
    model = build(DENSE, groups)
    full = view(61, samples=2, length=40, lengths=torch.tensor([40, 25]))
    short = view(61, samples=1, length=25, lengths=torch.tensor([25]))
    ids = torch.cat([full.ids[1:, :25], full.ids[1:, 40:65]], dim=1)
    with torch.no_grad():
        padded = model.rows(full).view(2, 2, 40, -1)[1, :, :25]
        alone = model.rows(dataclasses.replace(short, ids=ids)).view(2, 25, -1)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)
