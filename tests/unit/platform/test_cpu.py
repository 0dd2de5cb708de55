"""CUDA names answer on a machine without CUDA, and stay what they were on one with it."""

import subprocess
import sys

import tide_megatron.platform
from tide_megatron.platform import Platform, prepare_platform
from tide_megatron.platform.cpu import redirect_cuda

import pytest
import torch

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def test_preparing_twice_changes_nothing():
    found = prepare_platform()
    assert isinstance(found, Platform)
    assert prepare_platform() is found
    assert found.redirected_to_cpu is not torch.cuda.is_available()


@needs_no_cuda
def test_factories_with_a_cuda_device_make_cpu_tensors():
    like = torch.ones(2)
    made = [
        torch.tensor([1.0], device="cuda"),
        torch.empty(2, device="cuda:0"),
        torch.zeros(2, device=torch.device("cuda")),
        torch.ones(2, device=torch.device("cuda", 1)),
        torch.full((2,), 1.0, device="cuda"),
        torch.arange(2, device="cuda"),
        torch.rand(2, device="cuda"),
        torch.randn(2, device="cuda"),
        torch.randint(2, (2,), device="cuda"),
        torch.empty_like(like, device="cuda"),
        torch.zeros_like(like, device="cuda"),
        torch.ones_like(like, device="cuda"),
        torch.full_like(like, 2.0, device="cuda"),
        torch.zeros(2, device=torch.cuda.current_device()),
        torch.ones(2).cuda(),
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert torch.zeros(2, device="meta").device.type == "meta", "other devices pass through"


@needs_no_cuda
def test_a_device_in_force_still_reaches_the_wrapped_factories():
    code = (
        "import tide_megatron.platform, torch\n"
        "with torch.device('meta'): made = [torch.arange(3), torch.ones(2), torch.tensor([1])]\n"
        "print({tensor.device.type for tensor in made})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "{'meta'}"


def test_random_state_is_the_cpu_generator():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(5)), first)


@needs_no_cuda
def test_streams_and_events_are_inert_classes():
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    assert isinstance(torch.cuda.Stream, type)
    assert stream == torch.cuda.current_stream() == torch.cuda.default_stream()
    assert stream != "stream"
    assert len({stream, torch.cuda.Stream()}) == 1
    stream.wait_stream(torch.cuda.current_stream())
    stream.wait_event(event)
    assert stream.record_event(event) is event
    assert stream.query()
    event.record()
    event.wait()
    assert event.elapsed_time(torch.cuda.Event()) == 0.0
    assert torch.cuda.Stream.priority_range() == (0, 0)
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
    stream.synchronize()


@needs_no_cuda
def test_type_names_satisfy_megatron_and_conversions_still_convert():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype is torch.float64


@needs_no_cuda
def test_names_of_megatron_are_in_place():
    from megatron.core.jit import jit_fuser
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    sizes = torch.tensor([1, 2])
    for module in (moe_utils, token_dispatcher):
        assert module.maybe_move_tensor_to_cpu(sizes, as_numpy=True).tolist() == [1, 2]
        assert module.maybe_move_tensor_to_cpu(sizes) is sizes

    def function():
        return 1

    assert jit_fuser(function) is function


@needs_no_cuda
def test_our_own_compilation_still_works():
    assert "compile" in torch.compile.__name__
    script = (
        "import tide_megatron.platform, torch, torch._dynamo\n"
        "double = torch.compile(lambda x: x * 2 + torch.ones(2), backend='eager', fullgraph=True)\n"
        "print(double(torch.ones(2)).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "[3.0, 3.0]", done.stderr


def test_nothing_is_touched_where_cuda_works(monkeypatch):
    before = torch.cuda.current_device, torch.zeros, torch.Tensor.type, torch.cuda.Stream
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert redirect_cuda() is False
    assert before == (torch.cuda.current_device, torch.zeros, torch.Tensor.type, torch.cuda.Stream)
