"""What ranks find in their environment, and what is refused before any of them is started."""

import os

import pytest
import torch

from tests.parallel import launch_cases as cases
from tide_megatron.base.errors import ConfigError
from tide_megatron.launch import supervisor
from tide_megatron.launch.ranks import run_ranks

COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
GPUS = "CUDA_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (COMPILERS, GPUS, "RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def test_ranks_on_the_cpu_see_no_gpus_and_others_those_that_were_given(monkeypatch):
    monkeypatch.setenv(GPUS, "2,3")
    assert supervisor._environment(2, "cpu")[GPUS] == ""
    assert supervisor._environment(2, "cuda")[GPUS] == "2,3"
    assert supervisor._environment(2, "auto")[GPUS] == "2,3"
    with supervisor.start_environment("cpu"):
        assert os.environ[GPUS] == ""
    assert os.environ[GPUS] == "2,3"
    with supervisor.start_environment("cuda"):
        assert os.environ[GPUS] == "2,3"
    monkeypatch.delenv(GPUS)
    with supervisor.start_environment("cpu"):
        assert os.environ[GPUS] == ""
    assert GPUS not in os.environ


def test_a_rank_compiles_in_few_processes_unless_the_user_says_how_many(monkeypatch):
    assert supervisor._environment(8, "auto")[COMPILERS] == "4"
    with supervisor.start_environment("auto"):
        assert os.environ[COMPILERS] == "4"  # read when torch is imported
    assert COMPILERS not in os.environ
    monkeypatch.setenv(COMPILERS, "9")
    assert supervisor._environment(8, "auto")[COMPILERS] == "9"
    with supervisor.start_environment("auto"):
        assert os.environ[COMPILERS] == "9"


def test_more_ranks_than_gpus_are_refused_before_any_is_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(supervisor, "_start", lambda *_: pytest.fail("a rank was started"))
    for device in ("cuda", "auto"):
        with pytest.raises(ConfigError, match=r"^4 ranks on a machine that shows 2 GPU"):
            run_ranks(cases.add_ranks, ("",), 4, device)


def test_ranks_on_the_cpu_are_forked_where_this_process_has_cuda(monkeypatch):
    # A server started here would hold no signals for the ranks of later tests.
    monkeypatch.setattr(supervisor.forkserver, "ensure_running", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert supervisor.start_method("cuda").get_start_method() == "spawn"
    assert supervisor.start_method("auto").get_start_method() == "spawn"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("nothing is asked of CUDA"))
    assert supervisor.start_method("cpu").get_start_method() == "forkserver"
