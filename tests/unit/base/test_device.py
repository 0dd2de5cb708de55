"""The machine is read right: ranks of torchrun and srun, device words, threads; what is broken is named."""

import os

import pytest
import torch

from tide_megatron.base.device import Device, Ranks, choose_device, read_ranks
from tide_megatron.base.errors import ConfigError

VARIABLES = (
    *(
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_WORLD_SIZE",
        "OMP_NUM_THREADS",
    ),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_ID"),
)


@pytest.fixture
def machine(monkeypatch):
    """Give a function that sets exactly these variables."""

    def shows(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    shows()
    return shows


def with_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_plain_process_has_no_ranks(machine):
    assert read_ranks() is None
    machine(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="4")
    assert read_ranks() is None, "an salloc shell is not a step of srun"


def test_torchrun_is_read_and_goes_before_slurm(machine):
    slurm = {"SLURM_PROCID": "7", "SLURM_LOCALID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}
    machine(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", MASTER_ADDR="node1", MASTER_PORT="1234", **slurm)
    assert read_ranks() == Ranks(rank=5, local_rank=1, world_size=8, address="node1", port=1234)


def test_srun_is_read(machine):
    machine(SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_NTASKS="4", SLURM_STEP_ID="0", MASTER_ADDR="node0")
    assert read_ranks() == Ranks(rank=3, local_rank=1, world_size=4, address="node0", port=29500)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=None is not a number"),
        ({"RANK": "0", "LOCAL_RANK": "x", "WORLD_SIZE": "2"}, "LOCAL_RANK='x' is not a number"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=2 is outside a world of WORLD_SIZE=2"),
        ({"RANK": "-1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=-1 is outside"),
    ],
)
def test_broken_variables_are_named(machine, variables, message):
    machine(**variables)
    with pytest.raises(ConfigError, match=message):
        read_ranks()


def test_auto_takes_what_there_is(machine, monkeypatch):
    with_gpus(monkeypatch, 0)
    assert choose_device().type == "cpu"
    assert choose_device().backend == "gloo"
    with_gpus(monkeypatch, 2)
    machine(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", OMP_NUM_THREADS="3")
    assert choose_device() == Device(type="cuda", index=1, backend="nccl", threads=3)
    assert choose_device("cpu") == Device(type="cpu", index=0, backend="gloo", threads=3)
    assert choose_device("cuda").torch_device == torch.device("cuda", 1)


def test_devices_that_are_not_there_are_refused(machine, monkeypatch):
    with_gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match="no usable GPU"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="'gpu' is unknown; did you mean 'cpu'"):
        choose_device("gpu")
    with_gpus(monkeypatch, 2)
    machine(RANK="2", LOCAL_RANK="2", WORLD_SIZE="4")
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: this machine shows 2"):
        choose_device("auto")


def test_threads_are_shared_among_the_processes_of_a_machine(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert choose_device("cpu").threads == 8
    machine(RANK="0", LOCAL_RANK="0", WORLD_SIZE="4")
    assert choose_device("cpu").threads == 2
    machine(RANK="0", LOCAL_RANK="0", WORLD_SIZE="64", LOCAL_WORLD_SIZE="2")
    assert choose_device("cpu").threads == 4
    machine(RANK="0", LOCAL_RANK="0", WORLD_SIZE="64")
    assert choose_device("cpu").threads == 1
    machine(OMP_NUM_THREADS="0")
    assert choose_device("cpu").threads == 1


def test_facts_are_told(machine):
    facts = choose_device("cpu").facts()
    assert facts["device"] == "cpu"
    assert facts["torch"] == torch.__version__
