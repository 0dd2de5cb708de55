"""A GPU without bf16: whoever asks for bf16 on it is told so on every rank, before a weight is read."""

import pytest
import torch.distributed as dist

from tests.tiny_run import write_tiny_run
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.train import setup as module
from tide_megatron.train.resolve import load_recipe


def set_up_beside_an_old_gpu(file):
    """Set up a run in bf16 whose second rank has an old GPU; return what this rank is told."""
    rank = dist.get_rank()
    name, capability = ("Tesla T4", (7, 5)) if rank else ("NVIDIA H100", (9, 0))
    device = Device(type="cuda", index=0, backend="nccl", threads=1, name=name, capability=capability)
    recipe, _ = load_recipe(file, ["teachers.moe.precision=bf16", "head.form=plain"])
    stock, module.build_student = module.build_student, lambda *_: pytest.fail("weights were read")
    try:
        with pytest.raises(ConfigError) as told:
            module.set_up(recipe, device)
    finally:
        module.build_student = stock
    return str(told.value)


def test_every_rank_is_told_of_bf16_on_a_gpu_that_does_not_have_it(pool, tmp_path):
    told = pool(2).run(set_up_beside_an_old_gpu, write_tiny_run(tmp_path))
    said = "teachers.moe.precision: 'bf16' needs a GPU of sm_80 or newer, and this run has Tesla T4 (sm_75)"
    assert told == [f"{said}; use fp32"] * 2
