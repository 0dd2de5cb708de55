"""The same run on a CUDA device: losses near the CPU's, every kernel with gradients, resume bit for bit.

Skipped without a device. The processes are real ones: nothing here touches this one's torch.distributed.
"""

import json

import pytest
import torch

from tests.tiny_run import write_cross_run
from tide_megatron.diffusion.mask import Context, TwoViews
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models.attention import choose_kernel
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]


def losses_of(file, folder, device, *words):
    overrides = [f"folder={folder}", f"device={device}", "steps=6", *words]
    recipe, tree = load_recipe(file, overrides)
    run_ranks(train, (recipe, tree, True), 1, device)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    return write_cross_run(tmp_path_factory.mktemp("cross"))


def test_losses_and_norms_on_cuda_are_those_on_the_cpu(cross, tmp_path):
    wanted = losses_of(cross, tmp_path / "cpu", "cpu")
    for attention in ("dense", "structured", "flex"):
        found = losses_of(cross, tmp_path / attention, "cuda", f"attention={attention}")
        for got, expected in zip(found, wanted, strict=True):
            assert got == pytest.approx(expected, rel=2e-3), attention


def test_bf16_trains_near_fp32(cross, tmp_path):
    wanted = losses_of(cross, tmp_path / "fp32", "cuda")
    found = losses_of(cross, tmp_path / "bf16", "cuda", "student.precision=bf16")
    for (loss, _), (expected, _) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "context", [Context(kind="block_diffusion", block_size=16), Context(kind="bidirectional")]
)
@pytest.mark.parametrize("lengths", [None, (128, 70)])
def test_flex_has_the_gradients_of_dense(context, lengths):
    check_gradients(context, lengths)


def test_flex_has_the_gradients_of_dense_for_two_views():
    check_gradients(TwoViews(kind="block_diffusion", block_size=16), None)


def check_gradients(context, lengths):
    device, length = torch.device("cuda"), 128
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, context.parts * length, 32)] + 2 * [(2, 2, context.parts * length, 32)]
    parts = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    real = None if lengths is None else torch.tensor(lengths, device=device)
    outer = torch.randn(shapes[0], generator=generator).to(device)
    found = {}
    for name in ("dense", "flex"):
        make = choose_kernel(name, "cuda", trainable=True)
        answer = make(context, length, real, device)(*parts)
        found[name] = [answer, *torch.autograd.grad((answer * outer).sum(), parts)]
    for got, expected in zip(found["flex"], found["dense"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
