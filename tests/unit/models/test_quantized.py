"""Frozen models in FP8: what is held, how it is multiplied, bytes, streaming, equal engines, batchmates."""

import gc
import math

import tide_megatron.platform

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.models import test_batchmates
from tests.unit.models.shapes import (
    CPU,
    DENSE,
    DREAM,
    LLADA,
    LLADA_MOE,
    MIXTURE,
    WEDLM,
    architecture,
    build,
    view,
)
from tide_megatron.diffusion.mask import Context
from tide_megatron.models import fp8, quantized
from tide_megatron.models.build import build_model
from tide_megatron.models.engine import Engine
from tide_megatron.models.fp8 import SCALINGS, quantize
from tide_megatron.models.params import num_local_bytes
from tide_megatron.models.precision import Fp8Options, Precision
from tide_megatron.models.quantized import PRODUCTS, QuantizedGroupedExperts, QuantizedLinear
from tide_megatron.models.shard import Shard
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, load_model, save_model
from tide_megatron.teachers.teacher import ViewBuilder

CONFIGS = {
    "dense": DENSE,
    "mixture": MIXTURE,
    "wedlm": WEDLM,
    "dream": DREAM,
    "llada": LLADA,
    "moe": LLADA_MOE,
}
KERNELS = [*(("emulated", recipe) for recipe in SCALINGS), ("scaled", "rowwise"), ("scaled", "tensorwise")]
STREAMED = [*(("dense", recipe) for recipe in SCALINGS), ("mixture", "rowwise")]
HIGH = ("norm", "router", "embedding", "output_layer", "bias")
"""In the names of what keeps the model's precision."""


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize(("engine", "recipe"), KERNELS)
def test_a_product_is_that_of_the_rounded_numbers(engine, recipe, tokens):
    """Against fp64 over the numbers that the 8 bits and scales stand for, 128 dividing nothing."""
    scaling, generator = SCALINGS[recipe], torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, 208, generator=generator) for size in (tokens, 176))
    held = quantize(weight, scaling.weights, is_power_of_two=scaling.is_power_of_two)
    found = PRODUCTS[engine](rows, held, scaling)
    given = quantize(rows, scaling.inputs, is_power_of_two=scaling.is_power_of_two).dequantized()
    wanted = given.double() @ held.dequantized().double().t()
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_told", [True, False], ids=["by row", "afterwards"])
@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_scaled_engine_agrees_with_the_emulated_one(groups, monkeypatch, name, recipe, is_told):
    if not is_told:  # as torch 2.11 does on a CPU
        monkeypatch.setattr(quantized, "cpu_scales_rows", lambda: False)
    config = CONFIGS[name]
    seen = view(config["vocab_size"])
    one, other = (fp8_model(config, groups, recipe, engine=engine).rows(seen) for engine in PRODUCTS)
    assert error(one, other) < 1e-3


def fp8_model(config, groups, recipe="rowwise", *, engine="emulated", precision="fp32", **options):
    model = build_model(
        architecture(config),
        groups,
        ModelOptions(
            device=CPU,
            precision=Precision(precision),
            fp8=Fp8Options(recipe=recipe, **options),
            engine=Engine(name=engine),
        ),
    )
    draw_weights(model, 1)
    return model


@pytest.mark.parametrize("recipe", SCALINGS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_matrices_are_8_bits_and_all_else_keeps_its_precision(groups, name, recipe):
    config = CONFIGS[name]
    model = fp8_model(config, groups, recipe, precision="bf16")
    exact = build(config, groups)
    held = {name: tensor for name, tensor in model.named_parameters()}
    for key, tensor in exact.named_parameters():
        if any(word in key for word in HIGH):
            wanted = torch.float32 if "router.weight" in key else torch.bfloat16
            assert held[key].dtype is wanted, key
        else:
            layer = model.get_submodule(key.rpartition(".")[0])
            assert held[key].dtype is torch.float8_e4m3fn, key
            assert error(layer.quantized.dequantized(), tensor) < 0.03, key
    buffers = [buffer for key, buffer in model.named_buffers() if key.endswith("weight_scale")]
    counted = sum(tensor.nbytes for tensor in (*held.values(), *buffers))
    routers = sum(2 * tensor.numel() for key, tensor in held.items() if "router.weight" in key)  # fp32
    shard = Shard(num_layers=model.architecture.layers)
    fp8_options = Fp8Options(recipe=recipe)
    assert counted == num_local_bytes(model.architecture, shard, torch.bfloat16, fp8_options) + routers
    seen = view(config["vocab_size"])
    assert 0.005 < error(model.rows(seen), exact.rows(seen)) < 0.08


@torch.no_grad()
def test_matrices_at_true_widths_take_half_of_bf16s_bytes():
    """Scales are little beside the numbers: counted from LLaDA2-mini's and WeDLM-8B's shapes."""
    for width in ((2048, 2048), (4096, 12288), (2048, 512), (512, 2048)):
        for scaling in SCALINGS.values():
            scales = math.prod(fp8.scale_shape(width, scaling.weights))
            assert (math.prod(width) + 4 * scales) / (2 * math.prod(width)) < 0.505


def test_first_and_last_layers_can_be_excepted(groups):
    model = fp8_model(MIXTURE, groups, first_layers=1, last_layers=1)
    found = [
        any(isinstance(part, QuantizedLinear) for part in layer.modules()) for layer in model.decoder.layers
    ]
    assert found == [False, True, False]


class LiveBytes(TorchDispatchMode):
    """Follow every storage that an operator is given or makes; the most that lived at a time counts."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(part, torch.Tensor):
                self._note(part.untyped_storage())
        return result

    def _note(self, storage):
        known = self.live.get(storage._cdata)
        if known is None or known[0].expired():
            self.live = {key: one for key, one in self.live.items() if not one[0].expired()}
            self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.peak = max(self.peak, sum(size for _, size in self.live.values()))


@pytest.mark.parametrize(
    ("name", "recipe"), [*(("dense", recipe) for recipe in SCALINGS), ("mixture", "rowwise")]
)
def test_weights_are_quantised_as_they_are_read_and_never_all_in_bf16(
    groups, tmp_path, monkeypatch, recipe, name
):
    wide = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 64, "num_hidden_layers": 5}
    config = {**CONFIGS[name], **wide}
    if name == "mixture":
        config |= {"moe_intermediate_size": 128, "num_experts": 8}
    exact = build(config, groups, precision=Precision("bf16"))
    save_model(exact, tmp_path / "model")
    whole = sum(tensor.nbytes for tensor in exact.parameters())
    largest = max(tensor.nbytes for tensor in exact.parameters())
    monkeypatch.setattr(fp8, "CHUNK_ELEMENTS", 2**15)
    del exact
    gc.collect()
    with LiveBytes() as watched:
        options = ModelOptions(device=CPU, precision=Precision("bf16"), fp8=Fp8Options(recipe=recipe))
        model = build_model(architecture(config), groups, options)
        load_model(model, tmp_path / "model")
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert own < 0.6 * whole
    # What is read, what it is joined to, and a chunk with what makes 8 bits of it.
    assert watched.peak < own + 2 * largest + 8 * 4 * fp8.CHUNK_ELEMENTS
    assert watched.peak < 0.85 * whole


def shifts(model, exact):
    """Return how far an answer moves with its batchmates, and by FP8 at all: the worst of three samples."""
    builder = ViewBuilder(context=Context(kind="bidirectional"), mask_id=test_batchmates.MASK)

    def answer(of, samples, length=None):
        return test_batchmates.answers(
            of, builder, "shared", test_batchmates.batch_of(samples, 1, length=length)
        )

    alone = {number: answer(model, (number,))[number] for number in range(3)}
    together = [
        error(rows, alone[number])
        for samples, length in test_batchmates.BATCHES
        for number, rows in answer(model, samples, length).items()
    ]
    rounded = [error(alone[number], answer(exact, (number,))[number]) for number in range(3)]
    return max(together), max(rounded)


@pytest.mark.parametrize(
    ("engine", "recipe"), [(e, r) for e in PRODUCTS for r in SCALINGS if (e, r) != ("scaled", "blockwise")]
)
@pytest.mark.parametrize("name", ["dense", "mixture"])
@torch.no_grad()
def test_batchmates_move_an_answer_only_where_tokens_share_a_scale(groups, name, engine, recipe):
    config = CONFIGS[name]
    moved, rounded = shifts(fp8_model(config, groups, recipe, engine=engine), build(config, groups))
    assert 0.02 < rounded < 0.08
    if SCALINGS[recipe].spans_rows:
        assert 0.01 < moved < 2 * rounded  # as much as FP8 itself
    else:
        assert moved < 1e-6


def test_grouped_products_on_cuda_get_what_torch_asks_for(groups, monkeypatch):
    """On meta tensors: shapes, strides, dtypes and offsets pass torch's own checks of the CUDA operator."""
    monkeypatch.setattr(quantized, "groups_experts", lambda options: True)
    config = {**MIXTURE, "hidden_size": 64, "moe_intermediate_size": 48}
    experts = fp8_model(config, groups, engine="scaled").decoder.layers[1].mlp.experts
    assert isinstance(experts, QuantizedGroupedExperts)
    for name, (weights, scales) in experts.stacks.items():
        for number, layer in enumerate(experts._layers(name)):
            assert layer.weight.data_ptr() == weights[number].data_ptr()  # loading fills the stacks
            assert layer.weight_scale.data_ptr() == scales[number].data_ptr()
    experts.stacks = {name: tuple(t.to("meta") for t in pair) for name, pair in experts.stacks.items()}
    ends = torch.empty(8, dtype=torch.int64, device="meta")
    states = torch.empty(40, 64, dtype=torch.bfloat16, device="meta")
    inner = experts._product("linear_fc1", states, ends)
    assert (inner.shape, inner.dtype) == ((40, 96), torch.bfloat16)
    assert experts._product("linear_fc2", inner[:, :48].contiguous(), ends).shape == (40, 64)
