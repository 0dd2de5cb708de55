"""The paper's run with default settings passes every construction, on both kinds of device, without a GPU.

Student and teachers have the paper's shapes (fewer layers) and nothing that is set beyond folders, contexts
and losses. Tensors are fake: they have shape, dtype and device, and no memory, so what a GPU would hold can
be built here. What is left out: random numbers for the weights, collectives inside the building, and every
kernel (no product, no attention is computed, nothing is compiled).
"""

import contextlib
import json
from types import SimpleNamespace

from tide_megatron.platform.cpu import _FACTORIES

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bench.shapes import LLADA2_MINI, QWEN3_06B, WEDLM_8B
from tests.small_tokenizer import write_chats, write_tokenizer
from tide_megatron.base.device import Device
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.head import loss as head_loss
from tide_megatron.models import weights
from tide_megatron.models.attention import KERNELS
from tide_megatron.models.flex import CompiledFlex
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train import models, setup
from tide_megatron.train.resolve import build_recipe

LAYERS = {"num_hidden_layers": 2}
"""Of each model; all widths are the paper's."""
CONTEXT = {"kind": "block_diffusion", "block_size": 32}
GIB = 2**30
GRADIENTLESS = SimpleNamespace(
    grad_fn=SimpleNamespace(next_functions=[[SimpleNamespace(register_hook=lambda hook: None)]])
)
"""Where DDP hangs its hooks; for a parameter on CUDA torch would ask the CUDA runtime for a stream."""


@pytest.fixture
def recipe(tmp_path):
    """Return a recipe of the paper's pair in which nothing is set that has a default."""
    for name, config in {"student": QWEN3_06B, "mini": LLADA2_MINI, "wedlm": WEDLM_8B}.items():
        write_tokenizer(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | LAYERS))
    chats = write_chats(tmp_path / "chats.jsonl", [(f"ask {n}", f"tell {n}") for n in range(70)])
    prepare([chats], Tokenizer.load(tmp_path / "student"), tmp_path / "data", max_length=128)

    def model(name):
        return {"folder": str(tmp_path / name), "context": dict(CONTEXT), "initial": "random"}

    found, _ = build_recipe(
        {
            "folder": str(tmp_path / "run"),
            "steps": 10,
            "student": model("student"),
            "teachers": {"mini": model("mini"), "wedlm": model("wedlm")},
            "losses": {
                "ce": {"kind": "cross_entropy"},
                "tidal": {"kind": "tidal", "teacher": "wedlm"},
                "kl": {"kind": "kl", "teacher": "mini", "shared_vocab_size": 151_936},
                "reverse_calm": {"kind": "reverse_calm", "teacher": "mini"},
            },
            "data": {"train": str(tmp_path / "data")},
        }
    )
    return found


def part_of(tensor, index):
    """Index a fake tensor by slices and numbers; torch's own way asks a CUDA runtime for a device."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
            dim += 1
        else:
            assert isinstance(part, int), f"indexed by {part!r}"
            tensor = torch.ops.aten.select(tensor, dim, part)
    return tensor


def gather_of_one(box, own, group=None):
    box[0] = own


def moved(model, device):
    """Move what is not on the device yet; torch's own way swaps fakes, which fails where names share one."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.device != device:
                other = torch.nn.Parameter(weight.detach().to(device), requires_grad=weight.requires_grad)
                marks = {key: value for key, value in vars(weight).items() if key not in vars(other)}
                vars(other).update(marks)  # megatron-core's, such as which ranks hold copies
                module._parameters[name] = other
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


@pytest.fixture
def without_memory(monkeypatch):
    """Let models be built of fake tensors, on a device that need not be there."""
    for name in _FACTORIES:  # what the platform sends to the CPU here goes where it says
        monkeypatch.setattr(torch, name, getattr(getattr(torch, name), "__wrapped__", getattr(torch, name)))
    monkeypatch.setattr(FakeTensor, "__getitem__", part_of, raising=False)
    monkeypatch.setattr(FakeTensor, "copy_", lambda self, *given, **options: self, raising=False)
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    named = torch.Tensor.type  # the platform says "cuda" of CPU tensors; these are on CUDA
    monkeypatch.setattr(
        FakeTensor, "type", lambda self: named(self).replace("cuda.cuda", "cuda"), raising=False
    )
    monkeypatch.setattr(FakeTensor, "expand_as", lambda self, other: GRADIENTLESS, raising=False)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather_of_one)
    monkeypatch.setattr(models, "fail_together", contextlib.nullcontext)
    report = weights.LoadReport(parameters=0, tensors_read=0, bytes_read=0)
    monkeypatch.setattr(models, "draw_weights", lambda model, seed: report)
    for name in ("build_student", "build_teacher"):
        monkeypatch.setattr(setup, name, of_fakes(getattr(models, name)))


def of_fakes(build):
    def build_fakes(*given):
        with FakeTensorMode():
            return build(*given)

    return build_fakes


def free(monkeypatch, gibibytes):
    monkeypatch.setattr(head_loss, "free_bytes", lambda device: gibibytes * GIB)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.usefixtures("groups", "without_memory")
def test_default_settings_pass_every_construction(recipe, monkeypatch, kind):
    free(monkeypatch, 60)
    device = Device(type=kind, index=0, backend="gloo", threads=1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device.torch_device)
    run = setup.set_up(recipe, device).run
    models = {"student": run.student.model} | {name: one.model for name, one in run.teachers.items()}
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    for name, model in models.items():
        exact = {where for where, weight in model.named_parameters() if weight.dtype is not dtype}
        assert all(where.endswith("router.weight") for where in exact), name
        assert {weight.device for weight in model.parameters()} == {device.torch_device}, name
        compiled = isinstance(model.make_kernel, CompiledFlex)
        assert compiled if kind == "cuda" else model.make_kernel is KERNELS["structured"]
    table = run.student.model.head_weight
    assert (table.main_grad.shape, table.main_grad.dtype) == ((151_936, 1024), torch.float32)
    masters = [tensor for group in run.student.optimizer.param_groups for tensor in group["params"]]
    assert {tensor.dtype for tensor in masters} == {torch.float32}
    heads = {name: one.model.head_weight.shape for name, one in run.teachers.items()}
    assert heads == {"mini": (157_184, 2048), "wedlm": (151_936, 4096)}
    assert run.head._budget_bytes == {"cpu": 256, "cuda": 6144}[kind] * 2**20
    assert run.head.options.is_compiled(kind) is (kind == "cuda")
