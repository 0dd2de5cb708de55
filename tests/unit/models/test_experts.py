"""The experts' forms against megatron-core's own layer: values, gradients, order of sums, host waits."""

import logging
import re

import tide_megatron.platform
from tide_megatron.platform.cpu import InertEvent

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from bench.experts import Setting, measure
from tests.operations import Repeated
from tests.unit.models.shapes import CPU, LLADA_MOE, MIXTURE, architecture, view
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.stop import StopFlag
from tide_megatron.models.build import build_model
from tide_megatron.models.dispatcher import Order, add_copies, gather_copies
from tide_megatron.models.experts import FORMS, choose_form
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights

CONFIGS = {
    "sigmoid, groups": MIXTURE,
    "softmax": LLADA_MOE,
    "one copy": {**LLADA_MOE, "num_experts_per_tok": 1},
}
FEW = view(MIXTURE["vocab_size"], samples=1, length=3, kind="bidirectional")  # most experts get no token


def build(groups, config, form, *, precision="fp32", trainable=True):
    options = ModelOptions(
        device=CPU, precision=Precision(precision), trainable=trainable, experts=form, attention="dense"
    )
    model = build_model(architecture(config), groups, options)
    draw_weights(model, 3)
    return model


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def as_before(model):
    """Give a model's mixture layers megatron-core's own dispatcher."""
    for layer in mixtures(model):
        layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
            layer.num_local_experts, layer.local_expert_indices, layer.config, model.groups
        )
    return model


def answers(model, chosen):
    """Return the rows of a view and the gradient of every weight."""
    model.zero_grad()
    rows = model.rows(chosen)
    weight = torch.linspace(-1, 1, rows.numel()).view(rows.shape)
    if model.training:
        (rows.float() * weight).sum().backward()
    return rows.detach(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_megatron_cores_numbers_bit_for_bit_in_fp32(groups, config, form):
    for chosen in (view(config["vocab_size"]), FEW):
        wanted, slopes = answers(as_before(build(groups, config, "sequential")), chosen)
        rows, gradients = answers(build(groups, config, form), chosen)
        assert torch.equal(rows, wanted)
        assert gradients.keys() == slopes.keys()
        assert all(torch.equal(gradients[name], slope) for name, slope in slopes.items())
        frozen, _ = answers(build(groups, config, form, trainable=False), chosen)
        assert torch.equal(frozen, wanted)


def fused(model):
    """Let experts use megatron-core's fused activation, as on CUDA."""
    for layer in mixtures(model):
        for module in layer.experts.modules():
            if hasattr(module, "config"):
                module.config.bias_activation_fusion = True
    return model


@pytest.mark.parametrize("form", FORMS)
def test_in_bf16_and_with_the_fused_activation_every_form_is_the_same(groups, form):
    chosen = view(MIXTURE["vocab_size"])
    wanted, slopes = answers(fused(build(groups, MIXTURE, "sequential", precision="bf16")), chosen)
    rows, gradients = answers(fused(build(groups, MIXTURE, form, precision="bf16")), chosen)
    assert torch.equal(rows, wanted)
    assert all(torch.equal(gradients[name], slope) for name, slope in slopes.items())


def test_copies_are_added_in_fp32_from_the_lowest_expert_up():
    chosen = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]]).bool()
    order = Order.of(chosen, 3)
    assert order.token.tolist() == [0, 1, 0, 1, 0, 1]
    assert order.row.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert torch.equal(order.arrange(torch.arange(8.0).view(2, 4)), torch.tensor([0.0, 5, 2, 6, 3, 7]))
    rows = torch.tensor([[256.0], [256.0], [1.0], [1.0], [1.0], [1.0]]).bfloat16().requires_grad_()
    sums = add_copies(rows, order)
    assert sums.tolist() == [[258.0], [258.0]]  # bf16 would stay at 256 twice
    (slope,) = torch.autograd.grad(sums, rows, torch.tensor([[2.0], [3.0]]).bfloat16())
    assert slope.flatten().tolist() == [2, 3, 2, 3, 2, 3]
    tokens = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    (slope,) = torch.autograd.grad(gather_copies(tokens, order), tokens, rows.detach())
    assert slope.tolist() == [[258.0], [258.0]]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_added_to_one_place_twice(groups, form):
    model = build(groups, MIXTURE, form)
    hidden = torch.randn(6, 2, MIXTURE["hidden_size"], requires_grad=True)
    with Repeated() as repeated:
        mixtures(model)[0](hidden)[0].square().sum().backward()
    assert not repeated.names
    with Repeated() as before:
        mixtures(as_before(model))[0](hidden)[0].square().sum().backward()
    assert before.names >= {"scatter_add_", "index_add"}


@pytest.mark.parametrize("trainable", [False, True])
def test_grouped_experts_ask_the_device_for_no_number(groups, trainable, monkeypatch):
    """On a device that has shapes only, whoever asks for a number fails; so does waiting for an event."""
    monkeypatch.setattr(InertEvent, "synchronize", lambda event: pytest.fail("the host waits"))
    for form in ("grouped", "loop"):
        model = build(groups, MIXTURE, form, precision="bf16", trainable=trainable)
        layer = mixtures(model)[0].to("meta")
        if form == "grouped" and not trainable:
            layer.experts.lay_out()
        hidden = torch.zeros(6, 2, MIXTURE["hidden_size"], dtype=torch.bfloat16, device="meta")
        if form == "loop":
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                layer(hidden)
            continue
        out = layer(hidden.requires_grad_(trainable))[0]
        assert out.shape == hidden.shape
        if trainable:
            out.sum().backward()
            assert all(weight.grad is not None for weight in layer.experts.parameters())


def test_frozen_grouped_experts_lie_in_one_tensor_each_and_are_no_second_copy(groups):
    model = build(groups, MIXTURE, "grouped", trainable=False)
    for layer in mixtures(model):
        for name in ("linear_fc1", "linear_fc2"):
            weights = [getattr(expert, name).weight for expert in layer.experts.local_experts]
            storages = {weight.untyped_storage().data_ptr() for weight in weights}
            assert len(storages) == 1
            assert weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)
    layer.experts.local_experts[0].linear_fc1.weight.data = torch.zeros(48, 32)
    with pytest.raises(AssertionError, match="moved"):
        model.rows(FEW)


def test_the_bench_compares_every_form_and_a_padded_batch_that_gives_the_same(groups, monkeypatch):
    setting = Setting(shapes=("quickstart",), tokens=7, rounds=1, precision="fp32", trained=True)
    answers = []

    def seconds(layer, hidden, device):
        answers.append(layer(hidden)[0])
        return 1.0

    monkeypatch.setattr("bench.experts._seconds", seconds)
    found = measure(setting, device=CPU, stop=StopFlag())["quickstart"]
    assert {f"before / {form}" for form in (*FORMS, "padded")} < found.keys()
    for answer in answers:
        torch.testing.assert_close(answer, answers[0], rtol=1e-6, atol=1e-7)


def gpu(major, minor=0):
    return Device(type="cuda", index=0, backend="nccl", threads=1, name="GPU", capability=(major, minor))


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "widths", "form", "said"),
    [
        ("auto", CPU, torch.float32, (32, 24), "loop", "on CPU the loop is as fast"),
        ("auto", CPU, torch.bfloat16, (32, 24), "loop", "on CPU the loop is as fast"),
        ("auto", gpu(9), torch.bfloat16, (2048, 512), "grouped", "torch._grouped_mm"),
        ("auto", gpu(10), torch.bfloat16, (2048, 512), "grouped", "torch._grouped_mm"),
        ("auto", gpu(9), torch.float32, (2048, 512), "loop", "bf16, not float32"),
        ("auto", gpu(8), torch.bfloat16, (2048, 512), "loop", r"no kernel for GPU \(sm_80\)"),
        ("auto", gpu(9), torch.bfloat16, (2048, 28), "loop", "width 28 is no multiple of 8"),
        ("grouped", CPU, torch.float32, (32, 28), "grouped", "grouped on cpu"),
        ("sequential", gpu(9), torch.bfloat16, (32, 24), "sequential", "sequential on cuda"),
    ],
)
def test_the_form_is_chosen_by_a_rule_that_the_log_tells(caplog, wanted, device, dtype, widths, form, said):
    with caplog.at_level(logging.INFO, "tide_megatron"):
        assert choose_form(wanted, device, dtype, widths, "m") == form
    assert re.search(said, caplog.text)


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "said"),
    [
        ("groups", CPU, torch.float32, "experts: 'groups' is unknown.*grouped"),
        ("grouped", gpu(8), torch.bfloat16, "grouped is not available here .*sm_80.*; use loop or auto"),
        ("grouped", gpu(9), torch.float32, "grouped is not available here .*float32.*; use loop or auto"),
    ],
)
def test_a_form_that_is_not_there_is_refused(wanted, device, dtype, said):
    with pytest.raises(ConfigError, match=said):
        choose_form(wanted, device, dtype, (32, 24), "m")


def test_dense_layers_of_a_mixture_stay_as_they_are(groups):
    model = build(groups, MIXTURE, "grouped")
    assert [isinstance(layer.mlp, MoELayer) for layer in model.decoder.layers] == [False, True, True]
    assert all(
        isinstance(layer.experts, SequentialMLP) for layer in mixtures(model)
    )  # its checkpoints' names
