"""Number formats: chosen by device, refused by name."""

import tide_megatron.platform
from tide_megatron.platform.prepare import use_torch_for_routers

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from tests.unit.models.shapes import CPU, DENSE, MIXTURE, build, view
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.models.precision import Precision


def gpu(name, capability):
    return Device(type="cuda", index=0, backend="nccl", threads=1, name=name, capability=capability)


def test_auto_never_chooses_what_a_gpu_does_not_have():
    assert Precision.on("auto", gpu("H100", (9, 0))) == Precision("bf16")
    assert Precision.on("auto", gpu("A100", (8, 0))) == Precision("bf16")
    assert Precision.on("auto", gpu("T4", (7, 5))) == Precision("fp32")
    assert Precision.on("auto", CPU) == Precision("fp32")


def test_bf16_on_a_gpu_that_does_not_have_it_is_refused_with_the_gpu_and_the_remedy():
    with pytest.raises(ConfigError, match=r"^precision: 'bf16' needs .* has Tesla T4 \(sm_75\); use fp32$"):
        Precision.on("bf16", gpu("Tesla T4", (7, 5)))
    assert Precision.on("fp32", gpu("Tesla T4", (7, 5))) == Precision("fp32")
    assert Precision.on("bf16", CPU).dtype is torch.bfloat16


@pytest.mark.parametrize(("name", "told"), [("fp8", "teachers.NAME.fp8"), ("bf61", "did you mean 'bf16'")])
def test_unknown_formats_are_refused(name, told):
    with pytest.raises(ConfigError, match=told):
        Precision.on(name, gpu("H100", (9, 0)))


@pytest.mark.parametrize("config", [DENSE, MIXTURE])
def test_bf16_models_stay_close_to_fp32(groups, config):
    seen = view(config["vocab_size"])
    exact = build(config, groups).rows(seen)
    rounded = build(config, groups, precision=Precision("bf16")).rows(seen)
    assert rounded.dtype is torch.bfloat16
    difference = (rounded.float() - exact).norm() / exact.norm()
    assert difference < 0.03


def test_routers_keep_fp32_weights_in_a_bf16_model(groups):
    model = build(MIXTURE, groups, precision=Precision("bf16"))
    dtypes = {
        name: tensor.dtype for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)
    }
    routers = {name for name, dtype in dtypes.items() if dtype is torch.float32}
    assert routers == {
        f"decoder.layers.{i}.mlp.router.{part}" for i in (1, 2) for part in ("weight", "expert_bias")
    }


def one_dtype_only(weight, inputs, *args, **kwargs):
    """Stand in for Transformer Engine's product, as far as it would get."""
    raise AssertionError(f"asked to multiply {weight.dtype} by {inputs.dtype}")


def test_a_bf16_mixture_with_fp32_routers_runs_where_transformer_engine_is(groups, monkeypatch):
    monkeypatch.setattr(moe_utils, "te_general_gemm", one_dtype_only)
    use_torch_for_routers()
    model = build(MIXTURE, groups, precision=Precision("bf16"))
    assert model.decoder.layers[1].mlp.router.weight.dtype is torch.float32
    assert torch.isfinite(model.rows(view(MIXTURE["vocab_size"]))).all()
