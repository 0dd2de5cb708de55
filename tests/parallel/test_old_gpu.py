"""What a GPU machine does not have: whoever asks for it is told so on every rank, before a weight is read."""

import pytest
import torch.distributed as dist

from tests.tiny_run import write_tiny_run
from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError
from tide_megatron.train import setup as module
from tide_megatron.train.resolve import load_recipe

BF16 = (
    "teachers.moe.precision: 'bf16' needs a GPU of sm_80 or newer, and this run has Tesla T4 (sm_75); "
    "use fp32"
)
TE = "student.engine: 'te' cannot run: Transformer Engine is not installed; use engine=auto or engine=local"


def set_up_beside_an_old_gpu(file, word):
    """Set up a run whose second rank has an old GPU; return what this rank is told."""
    rank = dist.get_rank()
    name, capability = ("Tesla T4", (7, 5)) if rank else ("NVIDIA H100", (9, 0))
    device = Device(type="cuda", index=0, backend="nccl", threads=1, name=name, capability=capability)
    recipe, _ = load_recipe(file, [word, "head.form=plain"])
    stock, module.build_student = module.build_student, lambda *_: pytest.fail("weights were read")
    try:
        with pytest.raises(ConfigError) as told:
            module.set_up(recipe, device)
    finally:
        module.build_student = stock
    return str(told.value)


@pytest.mark.parametrize(
    ("word", "said"), [("teachers.moe.precision=bf16", BF16), ("student.engine=te", TE)], ids=["bf16", "te"]
)
def test_every_rank_is_told_of_what_is_not_there(pool, tmp_path, word, said):
    assert pool(2).run(set_up_beside_an_old_gpu, write_tiny_run(tmp_path), word) == [said] * 2
