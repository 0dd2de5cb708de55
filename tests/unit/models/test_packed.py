"""Packed views: samples that share a row are answered as if each had one of its own."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.unit.models.shapes import DENSE, DREAM, MIXTURE, build
from tests.unit.models.test_batchmates import FORMS, MASK, SIZES, batch_of, noised
from tide_megatron.diffusion.mask import Context, TwoViews, dense_mask
from tide_megatron.diffusion.packing import packed
from tide_megatron.diffusion.segments import Segments
from tide_megatron.models.attention import KERNELS, make_dense
from tide_megatron.models.flex import BLOCK, CompiledFlex, block_mask
from tide_megatron.teachers.teacher import ViewBuilder, merge_passes
from tide_megatron.train.student import Student

CONTEXTS = [
    Context(kind="bidirectional"),
    *(Context(kind=kind, block_size=4) for kind in ("block_causal", "block_diffusion")),
]
SAMPLES = (0, 1, 2, 2, 0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[DENSE, MIXTURE, DREAM], ids=lambda config: config["model_type"])
def model(request, groups):
    return build(request.param, groups)


def ask(model, builder, teacher, example):
    views = builder.views(teacher, example)
    return merge_passes(views, [model.rows(view) for view in views]), [len(view.ids) for view in views]


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_teacher_answers_alike(model, context, form):
    split, forwards = FORMS[form]
    builder = ViewBuilder(context=context, mask_id=MASK, complementary=split, forwards=forwards)
    kernels = ("structured", "dense", "flex") if form == "one forward" else ("structured",)
    for kernel in kernels:
        model.make_kernel = KERNELS[kernel]
        for teacher, length in (("shared", None), ("shared", 48), ("own", None)):
            example = noised(batch_of(SAMPLES, 1, length=length))
            wanted, rows = ask(model, builder, teacher, example)
            found, packs = ask(model, dataclasses.replace(builder, pack=True), teacher, example)
            assert all(fewer < more for fewer, more in zip(packs, rows, strict=True))
            assert len(found) > 8
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_a_student_answers_and_learns_alike(groups, context):
    model = build(DENSE, groups, trainable=True)
    example = noised(batch_of(SAMPLES, 1, length=48))
    found = []
    for pack in (False, True):
        student = SimpleNamespace(context=context, mask_id=MASK, pack=pack)
        view = Student.view(student, example)
        assert view.ids.shape == (2 if pack else 5, context.parts * 48)
        rows = model.rows(view)
        outer = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
        parameters = [parameter for name, parameter in model.named_parameters() if "output_layer" not in name]
        gradients = torch.autograd.grad((rows * outer).sum(), parameters)
        found.append([rows.detach(), *gradients])
    for ours, wanted in zip(*found, strict=True):
        assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@torch.no_grad()
def test_a_state_before_a_sample_is_no_other_samples(model, context):
    """A model whose states predict what follows is asked about the first token of every sample, too."""
    model.make_kernel = KERNELS["structured"]
    example = noised(batch_of(SAMPLES, 1))
    (view,) = ViewBuilder(context=context, mask_id=MASK).views("shared", example)
    sizes = [SIZES[number] for number in SAMPLES]
    place = torch.arange(view.ids.shape[1])
    rows = (place < torch.tensor(sizes)[:, None]).flatten().nonzero().flatten()
    view = dataclasses.replace(view, rows=rows)
    found = packed(view, sizes, view.length)
    assert len(found.ids) < len(view.ids)
    torch.testing.assert_close(model.rows(found), model.rows(view), rtol=1e-5, atol=1e-5)


def many_blocks(length=400):
    """Return the numbers of packs whose blocks of 128 hold several segments, one, or pads."""
    start = torch.tensor([0, 12, 140, 388, 0, 0, 256])
    tokens = torch.tensor([11, 120, 244, 8, 400, 256, 140])
    pack = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    return Segments(pack=pack, start=start, tokens=tokens).numbers(3, length)


TWO_VIEWS = TwoViews(kind="block_diffusion", block_size=4)


@pytest.mark.parametrize("context", [*CONTEXTS, TWO_VIEWS], ids=str)
def test_flex_leaves_out_no_block_and_fills_only_what_is_seen_whole(context):
    """Uncompiled it looks at the rule alone; compiled, at the lists of blocks."""
    length, numbers = 400, many_blocks()
    found = block_mask(context, length, numbers, CPU)
    mask = dense_mask(context, length, numbers)
    missing = -mask.shape[-1] % BLOCK
    mask = torch.nn.functional.pad(mask, (0, missing, 0, missing))
    blocks = mask.shape[-1] // BLOCK
    tiles = mask.view(3, blocks, BLOCK, blocks, BLOCK).transpose(2, 3).flatten(3)
    some, every = (
        listed(found.kv_num_blocks, found.kv_indices),
        listed(found.full_kv_num_blocks, found.full_kv_indices),
    )
    assert not (some & every).any()
    assert (tiles.any(-1) <= (some | every)).all()
    assert (every <= tiles.all(-1)).all()
    assert every.any()
    assert (some | every).sum() < (tiles.any(-1).sum() * 1.2), "and works on few that nobody sees into"


def listed(number, which):
    """Return [samples, blocks, blocks]: whether a key block is in the list of a query block."""
    found = torch.zeros(which[:, 0].shape, dtype=torch.bool)
    is_in = torch.arange(which.shape[-1]) < number[:, 0, :, None]
    return found.scatter(2, which[:, 0].long(), is_in)


@pytest.mark.parametrize("context", [*CONTEXTS, TWO_VIEWS], ids=str)
@torch.no_grad()
def test_flex_hides_other_samples_over_many_blocks(context):
    """Its own blocks hold several segments, one, or pads, and reach from one part into the next."""
    length, numbers = 400, many_blocks()
    draw = torch.Generator().manual_seed(2)
    parts = [torch.randn(3, 2, context.parts * length, 16, generator=draw) for _ in range(3)]
    wanted = make_dense(context, length, numbers, CPU)(*parts)
    for kernel in ("structured", "flex"):
        found = KERNELS[kernel](context, length, numbers, CPU)(*parts)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_hides_other_samples():
    make = CompiledFlex("m")
    for context, length in ((CONTEXTS[0], 512), (CONTEXTS[2], 448)):
        for numbers in (many_blocks(length), many_blocks(length).flip(0)):
            draw = torch.Generator().manual_seed(2)
            parts = [torch.randn(3, 2, context.parts * length, 16, generator=draw) for _ in range(3)]
            found = make(context, length, numbers, CPU)(*parts)
            wanted = make_dense(context, length, numbers, CPU)(*parts)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    assert make.compilations == 2
