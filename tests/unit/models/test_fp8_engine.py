"""Which engine computes a model in FP8; what devices, recipes and widths do not allow is refused by key."""

import tide_megatron.platform

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer

from tests.unit.models.shapes import CPU, DENSE, MIXTURE, architecture
from tests.unit.models.test_engine import ABSENT, H100, PLANNED
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.models.engine import Engine
from tide_megatron.models.fp8_engine import check_fp8, fp8_engine
from tide_megatron.models.precision import Fp8Options, Precision
from tide_megatron.models.spec import ModelOptions, filled, transformer_config
from tide_megatron.parallel.layout import Layout

BF16, FP32 = Precision("bf16"), Precision("fp32")
A100 = Device(type="cuda", index=0, backend="nccl", threads=1, name="A100", capability=(8, 0))
L40 = Device(type="cuda", index=0, backend="nccl", threads=1, name="L40", capability=(8, 9))


@pytest.mark.parametrize(
    ("wanted", "recipe", "precision", "device", "name"),
    [
        ("auto", "rowwise", FP32, CPU, "emulated"),
        ("auto", "blockwise", BF16, CPU, "emulated"),
        ("scaled", "rowwise", FP32, CPU, "scaled"),
        ("emulated", "blockwise", FP32, A100, "emulated"),
        ("auto", "rowwise", BF16, H100, "scaled"),
        ("auto", "tensorwise", BF16, L40, "scaled"),
        ("auto", "rowwise", BF16, PLANNED, "scaled"),
    ],
)
def test_the_engine_has_the_recipe(wanted, recipe, precision, device, name):
    assert fp8_engine(wanted, Fp8Options(recipe=recipe), precision, device, ABSENT).name == name


@pytest.mark.parametrize(
    ("wanted", "recipe", "precision", "device", "told"),
    [
        ("local", "rowwise", FP32, CPU, r"^engine: 'local' has no FP8 layers; use engine=auto"),
        (
            "scaled",
            "blockwise",
            BF16,
            H100,
            r"^fp8\.recipe: 'blockwise' is not one of engine 'scaled'; use row",
        ),
        ("te", "rowwise", BF16, H100, r"^fp8\.recipe: 'rowwise' is not one of engine 'te'; use blockwise or"),
        ("te", "blockwise", BF16, CPU, r"^engine: 'te' cannot run: .* on the CPU; use"),
        ("te", "tensorwise", BF16, H100, r"^engine: 'te' cannot run: .* is not installed; use"),
        ("auto", "rowwise", BF16, A100, r"^fp8: needs a GPU of sm_89 or newer, .* has A100 \(sm_80\); leave"),
        (
            "auto",
            "rowwise",
            FP32,
            H100,
            r"^fp8: FP8 products on CUDA come out in bf16, .* 'fp32'; use precision=",
        ),
        (
            "auto",
            "blockwise",
            BF16,
            H100,
            r"^fp8\.recipe: 'blockwise' needs Transformer Engine .*not installed; ",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_a_remedy(wanted, recipe, precision, device, told):
    with pytest.raises(ConfigError, match=told) as refusal:
        fp8_engine(wanted, Fp8Options(recipe=recipe), precision, device, ABSENT)
    assert "\n" not in str(refusal.value)


def test_widths_that_kernels_do_not_take_are_refused_before_weights_are_read():
    scaled, te, emulated = (Engine(name=name) for name in ("scaled", "te", "emulated"))
    narrow = architecture({**MIXTURE, "moe_intermediate_size": 40})
    with pytest.raises(ConfigError, match=r"multiples of 16, and a rank holds .*fc2\.weight \[32, 40\]"):
        check_fp8(Fp8Options(), scaled, H100, narrow, Layout())
    check_fp8(Fp8Options(), emulated, H100, narrow, Layout())
    check_fp8(Fp8Options(), scaled, CPU, narrow, Layout())
    # 32 of a feed-forward width fit 16 alone, and not once two ranks share 48.
    wide = architecture({**DENSE, "intermediate_size": 48})
    check_fp8(Fp8Options(), scaled, H100, wide, Layout())
    with pytest.raises(ConfigError, match=r"linear_fc2\.weight \[32, 24\]; use another recipe or layout"):
        check_fp8(Fp8Options(), scaled, H100, wide, Layout(tensor=2))
    blocks = Fp8Options(recipe="blockwise")
    with pytest.raises(ConfigError, match=r"'blockwise' on engine 'te' takes multiples of 128"):
        check_fp8(blocks, te, H100, wide, Layout())
    big = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 384}
    check_fp8(blocks, te, H100, architecture({**DENSE, **big}), Layout())


def test_leaving_out_every_layer_is_refused():
    for layers in ((2, 0), (1, 1), (0, 5)):
        fp8 = Fp8Options(first_layers=layers[0], last_layers=layers[1])
        with pytest.raises(ConfigError, match=r"leave none of 2 layers to quantise"):
            check_fp8(fp8, Engine(name="emulated"), CPU, architecture(DENSE), Layout())


def test_transformer_engine_is_asked_for_weights_at_rest_without_the_layers_that_are_left_out():
    """megatron-core takes the words, whether Transformer Engine is there or not; nothing of it runs here."""
    fp8 = Fp8Options(recipe="blockwise", first_layers=1)
    for name, wanted in (("te", "e4m3"), ("scaled", None)):
        options = ModelOptions(device=CPU, precision=BF16, engine=Engine(name=name), fp8=fp8)
        config = transformer_config(architecture(DENSE), options)
        assert config.fp8 == wanted
    options = ModelOptions(device=CPU, precision=BF16, engine=Engine(name="te"), fp8=fp8)
    config = transformer_config(architecture(DENSE), options)
    assert (config.fp8_recipe, config.fp8_param) == ("blockwise", True)
    assert [is_first_last_bf16_layer(config, layer) for layer in range(2)] == [True, False]
    rows = torch.ones(5, 1, 32)
    assert filled(rows, config).shape == (16, 1, 32)
    assert torch.equal(filled(rows, config)[:5], rows)
    with pytest.raises(ConfigError, match=r"leaves out the 1 layers of one pipeline stage at most"):
        check_fp8(
            Fp8Options(first_layers=2), Engine(name="te"), H100, architecture(MIXTURE), Layout(pipeline=3)
        )
