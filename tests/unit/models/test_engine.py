"""Which engine runs: decided once, named with its reason, refused where it is asked for and is not there."""

import pytest

from tests.unit.models.shapes import CPU
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.transformer_engine import TransformerEngine
from tide_megatron.models.engine import Engine
from tide_megatron.models.precision import Precision

H100 = Device(type="cuda", index=0, backend="nccl", threads=1, name="H100", capability=(9, 0))
PLANNED = Device(type="cuda", index=0, backend="nccl", threads=1)
HERE = TransformerEngine(version="2.17.1")
OLD = TransformerEngine(version="1.13.0")
ABSENT = TransformerEngine(fault="is not installed")
BROKEN = TransformerEngine(
    version="2.17.1", fault="is installed, but does not import (OSError: libcuda.so.1: cannot open)"
)
BF16, FP32 = Precision("bf16"), Precision("fp32")


@pytest.mark.parametrize(
    ("device", "precision", "library", "why"),
    [
        (CPU, BF16, HERE, "needs a CUDA device, and this model is on the CPU"),
        (H100, BF16, ABSENT, "Transformer Engine is not installed"),
        (H100, BF16, BROKEN, "Transformer Engine 2.17.1 is installed, but does not import (OSError: libcuda"),
        (H100, BF16, OLD, "Transformer Engine 1.13.0 is older than 2.2"),
        (H100, FP32, HERE, "multiplies fp32 in TF32"),
    ],
    ids=["cpu", "absent", "broken", "old", "fp32"],
)
def test_where_transformer_engine_cannot_run_auto_says_why_and_te_is_refused(device, precision, library, why):
    engine = Engine.on("auto", precision, device, library)
    assert engine.name == "local"
    assert why in str(engine)
    with pytest.raises(ConfigError, match=r"^engine: 'te' cannot run: [^\n]*; use engine=auto or") as refusal:
        Engine.on("te", precision, device, library)
    assert why in str(refusal.value)


def test_it_runs_where_it_imports_and_is_believed_of_a_gpu_that_is_only_planned():
    assert str(Engine.on("te", BF16, H100, HERE)) == "te engine (Transformer Engine 2.17.1)"
    assert str(Engine.on("auto", BF16, H100, HERE)).startswith(
        "local engine (Transformer Engine 2.17.1 is here"
    )
    for library in (HERE, ABSENT):
        assert Engine.on("te", BF16, PLANNED, library).name == "te"


def test_the_local_engine_runs_everywhere():
    for device in (CPU, H100):
        assert str(Engine.on("local", BF16, device, HERE)) == "local engine (as asked)"


@pytest.mark.parametrize(("wanted", "told"), [("scaled", "fp8 is not set"), ("locl", "mean .local.")])
def test_other_words_are_refused(wanted, told):
    with pytest.raises(ConfigError, match=told):
        Engine.on(wanted, BF16, H100, HERE)
