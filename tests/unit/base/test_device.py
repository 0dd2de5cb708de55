"""The machine is read right: ranks of torchrun and srun, device words, threads; what is broken is named."""

import os
import platform

import pytest
import torch

from tide_megatron.base.device import (
    Device,
    Ranks,
    check_gpus,
    choose_device,
    choose_kind,
    read_ranks,
)
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
    "NCCL_HOSTID",
)


@pytest.fixture
def machine(monkeypatch):
    """Give a function that sets exactly these variables."""

    def shows(**variables):
        for name in (*VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    shows()
    return shows


def with_gpus(monkeypatch, count, capability=(9, 0), name="NVIDIA H100"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)


def task(rank, ntasks=4, **others):
    """Return the variables of a task of srun, ranks counted on one machine."""
    given = {"PROCID": rank, "LOCALID": rank, "NTASKS": ntasks, "STEP_ID": 0, **others}
    return {f"SLURM_{name}": str(value) for name, value in given.items()}


def torchrun(rank, local_size, world_size=None):
    world_size = world_size or local_size
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_size),
    }


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
        (
            {"WORLD_SIZE": "4"},
            r"^WORLD_SIZE=4 is set, but RANK and LOCAL_RANK are not; `unset WORLD_SIZE` ",
        ),
        ({"RANK": "0"}, r"^RANK=0 is set, but LOCAL_RANK and WORLD_SIZE are not; `unset RANK` where"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is not; `unset RANK LOCAL_RANK`"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"}, "else set LOCAL_RANK too"),
        ({"RANK": "0", "LOCAL_RANK": "x", "WORLD_SIZE": "2"}, "LOCAL_RANK='x' is not a whole number; set it"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='' is not a whole number"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=2 is outside a world of WORLD_SIZE=2"),
        ({"RANK": "-1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=-1 is outside"),
        (torchrun(0, 2) | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number"),
        (torchrun(0, 2) | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"},
            "not SLURM_LOCALID; start",
        ),
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
    place = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0"}
    machine(**place, OMP_NUM_THREADS="3")
    h100 = {"name": "NVIDIA H100", "capability": (9, 0)}
    assert choose_device() == Device(type="cuda", index=1, backend="nccl", threads=3, **h100)
    assert choose_device("cpu") == Device(type="cpu", index=0, backend="gloo", threads=3)
    assert choose_device("cuda").torch_device == torch.device("cuda", 1)


def test_devices_that_are_not_there_are_refused(machine, monkeypatch):
    with_gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match="no usable GPU"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="'gpu' is unknown; did you mean 'cpu'"):
        choose_device("gpu")
    with_gpus(monkeypatch, 2)
    machine(RANK="2", LOCAL_RANK="2", WORLD_SIZE="4", MASTER_ADDR="node0")
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: this machine shows 2"):
        choose_device("auto")


def test_threads_are_shared_among_the_processes_of_a_machine(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert choose_device("cpu").threads == 8
    machine(RANK="0", LOCAL_RANK="0", WORLD_SIZE="4", MASTER_ADDR="node0")
    assert choose_device("cpu").threads == 2
    machine(RANK="0", LOCAL_RANK="0", WORLD_SIZE="64", LOCAL_WORLD_SIZE="2", MASTER_ADDR="node0")
    assert choose_device("cpu").threads == 4
    machine(RANK="0", LOCAL_RANK="0", WORLD_SIZE="64", MASTER_ADDR="node0")
    assert choose_device("cpu").threads == 1
    machine()


@pytest.mark.parametrize(
    ("setting", "threads"),
    [("0", 1), ("3", 3), ("4,1", 4), (" 2 , 2, 1", 2), ("", 8), ("four", None), (",1", None), ("1.5", None)],
)
def test_threads_are_openmps_where_it_says_so(machine, monkeypatch, setting, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    machine(OMP_NUM_THREADS=setting)
    if threads is None:
        with pytest.raises(ConfigError, match=r"^environment variable OMP_NUM_THREADS=.* `unset OMP_NUM_T"):
            choose_device("cpu")
    else:
        assert choose_device("cpu").threads == threads


def test_threads_of_slurms_tasks_are_those_of_one_machine(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    machine(**task(7, 64, TASKS_PER_NODE="8(x8)"))
    assert choose_device("cpu").threads == 3
    machine(**task(7, 11, TASKS_PER_NODE="4(x2),3", NODEID=2), MASTER_ADDR="node1")
    assert choose_device("cpu").threads == 8
    machine(**task(7, 11, TASKS_PER_NODE="8,3", STEP_TASKS_PER_NODE="4(x2),3", NODEID=1), MASTER_ADDR="node1")
    assert choose_device("cpu").threads == 6
    machine(**task(7, 64, NTASKS_PER_NODE=8))
    assert choose_device("cpu").threads == 3
    machine(**task(7, 64, TASKS_PER_NODE="8(x8)", CPUS_PER_TASK=6))
    assert choose_device("cpu").threads == 6
    machine(**task(7, 64, CPUS_PER_TASK=96))  # more than it may use
    assert choose_device("cpu").threads == 24
    # One torchrun a machine, started by srun: the CPUs of a task are those of all its ranks.
    machine(**task(0, 8, CPUS_PER_TASK=24), **torchrun(5, 12, 96), MASTER_ADDR="node1")
    assert choose_device("cpu").threads == 2


@pytest.mark.parametrize("rank", range(4))
def test_a_task_of_srun_takes_the_one_gpu_that_it_sees(machine, monkeypatch, rank):
    with_gpus(monkeypatch, 1)
    machine(**task(rank, TASKS_PER_NODE=4))
    assert choose_device("auto").index == 0
    wrapped = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "4", "MASTER_ADDR": "node0"}
    machine(**wrapped, **task(rank))  # a wrapper's variables
    assert choose_device("auto").index == 0


@pytest.mark.parametrize("rank", range(4))
def test_more_ranks_than_gpus_are_refused_on_every_rank_alike(machine, monkeypatch, rank):
    with_gpus(monkeypatch, 1)
    machine(**torchrun(rank, 4))
    said = (
        r'^4 ranks on a machine that shows 1 GPU\(s\): .*"Duplicate GPU detected".*at most 1 here, or set dev'
    )
    with pytest.raises(ConfigError, match=said):
        choose_device("auto")
    with_gpus(monkeypatch, 2)
    machine(**task(rank, TASKS_PER_NODE=4))
    with pytest.raises(ConfigError, match=r"^4 ranks on a machine that shows 2 GPU\(s\)"):
        choose_device("auto")
    with_gpus(monkeypatch, 4)
    machine(**task(rank, 32, TASKS_PER_NODE="4(x8)"), MASTER_ADDR="node1")
    assert choose_device("auto").index == rank


def test_ranks_may_share_a_gpu_on_purpose(machine, monkeypatch):
    with_gpus(monkeypatch, 1)
    for rank in range(4):
        own = {"NCCL_HOSTID": f"r{rank}", "MASTER_ADDR": "127.0.0.1"}
        machine(RANK=f"{rank}", LOCAL_RANK="0", WORLD_SIZE="4", **own)
        assert choose_device("cuda").index == 0
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert choose_device("cuda").index == 0


@pytest.mark.parametrize("address", [None, ""])
@pytest.mark.parametrize(
    "variables",
    [
        task(0, 16, NNODES=2),
        task(0, 16, NNODES=1, STEP_NUM_NODES=2),
        task(8, 16, LOCALID=0),
        task(0, 16, STEP_TASKS_PER_NODE="8(x2)"),
        task(0, 16, NNODES=2, STEP_NODELIST="a[1-2]", DISTRIBUTION="arbitrary"),
        task(0, 16, NNODES=4, STEP_NUM_NODES=2, JOB_NODELIST="a[1-4]"),
        torchrun(0, 8, 16),
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "16"},
    ],
    ids=["job", "step", "places", "tasks", "arbitrary", "other nodes", "torchrun", "by hand"],
)
def test_ranks_of_several_machines_must_be_told_where_rank_0_is(machine, monkeypatch, variables, address):
    machine(**variables, **({} if address is None else {"MASTER_ADDR": address}))
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR is not set, .* the 16 ranks .*scontrol show hostn"):
        read_ranks()
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert read_ranks().address == "node7"


@pytest.mark.parametrize(
    "variables",
    [
        task(0, 8),
        task(0, 8, NNODES=1),
        task(0, 8, NNODES=4, STEP_NUM_NODES=1),
        torchrun(0, 8),
        torchrun(0, 1),
        {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", **task(3, 8, NNODES=1)},
    ],
)
def test_ranks_of_one_machine_find_each_other(machine, variables):
    machine(**variables)
    assert read_ranks().address == "127.0.0.1"


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        (task(0, 16, NNODES=2, JOB_NODELIST="node[001-002]"), "node001"),
        (task(9, 16, LOCALID=1, NNODES=2, JOB_NODELIST="a-7,a-8"), "a-7"),
        (task(0, 8, NNODES=4, STEP_NUM_NODES=2, STEP_NODELIST="n[3,7]", JOB_NODELIST="n[1-9]"), "n3"),
        (task(0, 8, NNODES=2, NODELIST="gpu-[07-09,12].site,login"), "gpu-07.site"),
    ],
)
def test_the_first_node_of_the_step_has_rank_0(machine, variables, address):
    machine(**variables)
    assert read_ranks().address == address


def test_a_bad_list_of_nodes_is_named(machine):
    machine(**task(0, 16, NNODES=2, JOB_NODELIST="n[1-2"))
    with pytest.raises(ConfigError, match=r"^SLURM_JOB_NODELIST='n\[1-2' is no list of nodes .*MASTER_ADDR$"):
        read_ranks()


PTY = {"PTY_PORT": 40001, "PTY_WIN_COL": 80}


@pytest.mark.parametrize(
    ("variables", "is_rank"),
    [
        (task(0, 4), True),
        (task(0, 1), False),
        (task(0, 1, **PTY), False),
        (task(0, 8, STEP_NUM_TASKS=1), False),
        (task(0, 4, **PTY), False),
        (task(0, 4, **PTY, TASK_PID=1), False),
        (task(0, 4, **PTY, TASK_PID=os.getpid()), True),
        (task(2, 4, **PTY, TASK_PID=1), True),
        (task(0, 4, STEP_ID=4294967290), False),
        (task(0, 4, STEP_ID=4294967291), False),
        (task(0, 4, STEP_ID=""), False),
    ],
)
def test_a_shell_of_srun_is_no_rank(machine, variables, is_rank):
    machine(**variables)
    assert (read_ranks() is not None) == is_rank


def test_a_process_that_starts_ranks_asks_nothing_of_a_gpu(machine, monkeypatch):
    with_gpus(monkeypatch, 2)
    for name in ("get_device_capability", "get_device_name", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda index: pytest.fail("it starts CUDA in this process"))
    assert [choose_kind(wanted) for wanted in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    check_gpus(2)
    with pytest.raises(ConfigError, match="3 ranks on a machine that shows 2"):
        check_gpus(3)


@pytest.mark.parametrize(
    ("capability", "has_bf16"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_a_gpu_is_described_with_what_it_can_do(machine, monkeypatch, capability, has_bf16):
    with_gpus(monkeypatch, 1, capability, "Tesla T4")
    device = choose_device("cuda")
    assert device.has_bf16 is has_bf16
    assert device.facts()["name"] == f"Tesla T4 (sm_{capability[0]}{capability[1]})"


def test_facts_are_told(machine):
    facts = choose_device("cpu").facts()
    assert facts["device"] == "cpu"
    assert facts["name"] == platform.machine()
    assert facts["torch"] == torch.__version__
