"""Choose the device and read which rank this process is: the one place that looks at the machine.

Environment variables choose machines, never mathematics, and only this file and `launch/` read them.
Everything above gets a `Device` and a `Ranks` as plain values. Left out: process groups
(`platform.distributed`) and the attention kernel (`models.attention`), which depends on the model as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.base.nodes import expand_nodes, tasks_by_node

Wanted = Literal["auto", "cpu", "cuda"]
Kind = Literal["cpu", "cuda"]

# (rank, local rank, world size, address, port) under torchrun, then under srun.
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT")
_LOCALHOST, _DEFAULT_PORT = "127.0.0.1", 29500
_OWN_STEPS = 0xFFFFFFF0
"""Step ids from here on are SLURM's own."""
# Set by torchrun and by `launch/supervisor.py`, whose ranks of one machine all see the same GPUs.
_LOCAL_SIZE = "LOCAL_WORLD_SIZE"
# Set by who puts several ranks on one GPU on purpose: NCCL then takes them for ranks of several machines.
_HOST_ID = "NCCL_HOSTID"
_BF16_SINCE = (8, 0)
_FP8_SINCE = (8, 9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """Hold the place of this process among the processes of the run.

    `local_rank` counts within one machine and picks the GPU; `address` and `port` are where rank 0 listens.
    """

    rank: int
    local_rank: int
    world_size: int
    address: str = _LOCALHOST
    port: int = _DEFAULT_PORT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Where this process computes and how it talks: chosen once, logged once, handed down."""

    type: Kind
    index: int
    backend: Literal["gloo", "nccl"]
    threads: int
    name: str = ""
    """Of the GPU; empty on a CPU."""
    capability: tuple[int, int] | None = None
    """Of the GPU as torch tells it, (8, 0) for sm_80; None on a CPU, and for a GPU that is only planned."""

    @property
    def torch_device(self) -> torch.device:
        """Return the device in torch's words."""
        return torch.device("cpu") if self.type == "cpu" else torch.device("cuda", self.index)

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 runs here: on every CPU, and on GPUs from sm_80 on."""
        return self.capability is None or self.capability >= _BF16_SINCE

    @property
    def has_fp8(self) -> bool:
        """Whether FP8 products run here: on every CPU, and on GPUs from sm_89 on."""
        return self.capability is None or self.capability >= _FP8_SINCE

    @property
    def described(self) -> str:
        """Name the GPU with its capability, or the CPU's kind."""
        if self.capability is None:
            return self.name or platform.machine()
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"

    def facts(self) -> dict[str, str | int]:
        """Describe device and software for the log and for `tide doctor`."""
        return {
            "device": str(self.torch_device),
            "name": self.described,
            "backend": self.backend,
            "threads": self.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


def read_ranks() -> Ranks | None:
    """Read this process's place from torchrun's variables, or from SLURM's; None when neither started it.

    Raises:
        ConfigError: when a variable of the set is missing, not a number, the rank is outside the world, or
            ranks of several machines are not told where rank 0 is.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return _ranks_from(_TORCHRUN)
    return _ranks_from(_SLURM) if _is_slurm_rank() else None


def _is_slurm_step() -> bool:
    """Say whether srun started this process; a shell of `salloc` has its variables too, but no step id.

    The steps that SLURM numbers by itself (batch script, interactive shell) are no srun of the user's.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in os.environ and step != "" and not (step.isdigit() and int(step) >= _OWN_STEPS)


def _is_slurm_rank() -> bool:
    """Say whether this process is one of the ranks that srun started, and not a shell or what runs in one.

    A step of one task is as good as no step: this process may start ranks itself. In a step of several with
    a terminal (`srun -n 4 --pty bash`) the first task has it, and what is not that task itself runs there.
    """
    if not _is_slurm_step() or _slurm_world() == "1":
        return False
    has_terminal = any(name.startswith("SLURM_PTY_") for name in os.environ)
    is_the_task = os.environ.get("SLURM_TASK_PID") == str(os.getpid())
    return not has_terminal or is_the_task or os.environ["SLURM_PROCID"] != "0"


def _slurm_world() -> str | None:
    """Return how many tasks the step has; in a step of its own the job's number may be another."""
    return os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS")


def _ranks_from(names: tuple[str, str, str, str, str]) -> Ranks:
    given = {name: os.environ.get(name) for name in names}
    if names is _SLURM:
        given["SLURM_NTASKS"] = _slurm_world()
    missing = [name for name in names[:3] if given[name] is None]
    if missing:
        raise ConfigError(_advice(names, given, missing))
    rank, local_rank, world_size = (_whole(name, given[name]) for name in names[:3])
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{names[0]}={rank} is outside a world of {names[2]}={world_size} ranks, which count from 0; "
            f"correct the two, or unset both to run without them"
        )
    port = _whole("MASTER_PORT", given["MASTER_PORT"]) if given["MASTER_PORT"] else _DEFAULT_PORT
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT={port} is no port; use one from 1024 to 65535")
    address = given["MASTER_ADDR"] or _derived_address(names, world_size)
    return Ranks(rank=rank, local_rank=local_rank, world_size=world_size, address=address, port=port)


def _advice(names: tuple[str, ...], given: Mapping[str, str | None], missing: Sequence[str]) -> str:
    """Say what to do about some of a launcher's variables without the others."""
    there = ", ".join(f"{name}={given[name]}" for name in names[:3] if given[name] is not None)
    if names is _SLURM:
        return f"srun set {there} but not {', '.join(missing)}; start the run anew with srun, or with --ranks"
    leftover = " ".join(name for name in names[:3] if given[name] is not None)
    return (
        f"{there} is set, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; "
        f"`unset {leftover}` where this is left over from elsewhere, else set "
        f"{' and '.join(missing)} too (every launcher's rank needs all three of {', '.join(names[:3])})"
    )


def _derived_address(names: tuple[str, ...], world_size: int) -> str:
    """Return where rank 0 listens, where MASTER_ADDR does not say so.

    It is this machine where no other takes part, and the first node of srun's step. Ranks that somebody
    numbered without torchrun must be told: their variables do not say how many machines there are.
    """
    local_size = _local_size()
    if world_size in (1, local_size):
        return _LOCALHOST
    if _is_slurm_step() and local_size is None and _is_one_node(is_rank_of_srun=names is _SLURM):
        return _LOCALHOST
    if names is _SLURM and os.environ.get("SLURM_DISTRIBUTION") != "arbitrary":
        node = _first_node()
        if node is not None:
            return node
    raise ConfigError(
        f"MASTER_ADDR is not set, and nothing else says on which machine rank 0 of the {world_size} ranks "
        "is; before the command that starts them put export MASTER_ADDR=127.0.0.1 where all are on one "
        'machine, else export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1), or '
        "that machine's name"
    )


def _is_one_node(*, is_rank_of_srun: bool) -> bool:
    """Say whether SLURM's step has one node; an srun that tells no number of nodes is judged by its tasks."""
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES")
    if nodes or not is_rank_of_srun:
        return nodes == "1"
    tasks = tasks_by_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE") or "")
    is_first = (os.environ.get("SLURM_NODEID") or "0") == "0"
    return len(tasks) <= 1 and is_first and os.environ["SLURM_PROCID"] == os.environ["SLURM_LOCALID"]


def _first_node() -> str | None:
    """Return the name of the first node of srun's step; None where SLURM does not say which nodes it has."""
    names = ["SLURM_STEP_NODELIST"]
    if os.environ.get("SLURM_STEP_NUM_NODES") in (None, os.environ.get("SLURM_NNODES")):
        names += ["SLURM_JOB_NODELIST", "SLURM_NODELIST"]
    name = next((name for name in names if os.environ.get(name)), None)
    return None if name is None else expand_nodes(os.environ[name], name)[0]


def _local_size() -> int | None:
    """Return how many ranks a launcher started on this machine; None where none said so."""
    return _number(_LOCAL_SIZE) if os.environ.get(_LOCAL_SIZE) else None


def _number(name: str) -> int:
    return _whole(name, os.environ.get(name))


def _whole(name: str, text: str | None) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(
            f"environment variable {name}={text!r} is not a whole number; set it to one, or `unset {name}`"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """The SLURM job that this process belongs to."""

    name: str
    """Its number, with the cluster's name where that is known."""
    restarts: int
    """How often SLURM has started it again."""


def read_job() -> SlurmJob | None:
    """Return the SLURM job of this process; None outside of one."""
    number = os.environ.get("SLURM_JOB_ID", "")
    if not number:
        return None
    restarts, cluster = os.environ.get("SLURM_RESTART_COUNT", ""), os.environ.get("SLURM_CLUSTER_NAME", "")
    return SlurmJob(
        name=f"{number} on {cluster}" if cluster else number,
        restarts=int(restarts) if restarts.isdecimal() else 0,
    )


def choose_kind(wanted: Wanted = "auto") -> Kind:
    """Choose between CPU and CUDA. It starts nothing on a GPU, so a process that starts ranks may ask.

    Args:
        wanted: `auto` takes CUDA where it works; `cpu` and `cuda` insist.

    Raises:
        ConfigError: for an unknown word, or for `cuda` on a machine without it.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: {wanted!r} is unknown; {nearest(str(wanted), ('auto', 'cpu', 'cuda'))}")
    if wanted == "cpu":
        return "cpu"
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("device: 'cuda' was asked for but torch finds no usable GPU; use 'cpu' or 'auto'")
    return "cuda" if has_cuda else "cpu"


def choose_device(wanted: Wanted = "auto") -> Device:
    """Choose device, backend and thread count for this process.

    Args:
        wanted: as for `choose_kind`.

    Raises:
        ConfigError: as for `choose_kind`, or when there are more ranks on this machine than GPUs.
    """
    kind, ranks = choose_kind(wanted), read_ranks()
    if kind == "cpu":
        return Device(type="cpu", index=0, backend="gloo", threads=_threads(ranks))
    index = _gpu_of(ranks) if ranks else 0
    return Device(
        type="cuda",
        index=index,
        backend="nccl",
        threads=_threads(ranks),
        name=torch.cuda.get_device_name(index),
        capability=torch.cuda.get_device_capability(index),
    )


def check_gpus(ranks: int) -> None:
    """Refuse more ranks than GPUs on this machine, where all ranks see the same GPUs.

    Raises:
        ConfigError: names what NCCL would say, and what to do.
    """
    visible = torch.cuda.device_count()
    if ranks > visible:
        raise ConfigError(
            f"{ranks} ranks on a machine that shows {visible} GPU(s): NCCL refuses two ranks on one GPU "
            f'("Duplicate GPU detected"); start at most {visible} here, or set device=cpu'
        )


def _gpu_of(ranks: Ranks) -> int:
    """Return the number of this rank's GPU among those it sees.

    Ranks of torchrun and of our own launcher see the same GPUs. A task of srun may see one that is its own,
    and its local rank is then no index; whether two tasks see the same one only they can tell each other
    (`launch.worker`).
    """
    visible, local_size = torch.cuda.device_count(), _local_size()
    if local_size is None and visible == 1:
        return 0
    if _HOST_ID not in os.environ:
        check_gpus(local_size or _slurm_tasks() or 1)
    if ranks.local_rank >= visible:
        raise ConfigError(
            f"local rank {ranks.local_rank} has no GPU: this machine shows {visible}; "
            "start at most one process per GPU"
        )
    return ranks.local_rank


def _slurm_tasks() -> int | None:
    """Return how many tasks srun started on this machine; None where SLURM does not say."""
    if not _is_slurm_rank():
        return None
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        counts = tasks_by_node(os.environ.get(name, ""))
        if counts:
            node = int(os.environ.get("SLURM_NODEID") or 0)
            return counts[node] if node < len(counts) else counts[0]
    return None


def node_share() -> tuple[int, int]:
    """Return (this rank, ranks) of this machine; (0, 1) where no launcher started several.

    Raises:
        ConfigError: as `read_ranks`.
    """
    ranks = read_ranks()
    return (ranks.local_rank, _local_size() or _slurm_tasks() or 1) if ranks else (0, 1)


def _threads(ranks: Ranks | None) -> int:
    """Return OMP_NUM_THREADS where set, else this process's share of the machine's cores."""
    setting = os.environ.get("OMP_NUM_THREADS", "").strip()
    if setting:  # one number for each level of nested regions; torch uses the first
        return max(1, _whole("OMP_NUM_THREADS", setting.split(",")[0]))
    cores, local_size = len(os.sched_getaffinity(0)), _local_size()
    if local_size is None and _is_slurm_step() and os.environ.get("SLURM_CPUS_PER_TASK"):
        return max(1, min(cores, _number("SLURM_CPUS_PER_TASK")))
    return max(1, cores // (local_size or _slurm_tasks() or (ranks.world_size if ranks else 1)))


def gloo_interfaces() -> list[str]:
    """Return the network interfaces that `GLOO_SOCKET_IFNAME` names; none: gloo's own choice."""
    return [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]


def is_loopback(address: str) -> bool:
    """Say whether an address as it is written leads nowhere but to this machine; a name may, elsewhere."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def no_tokenizer_threads() -> Iterator[None]:
    """Let the library of tokenizer.json start no threads, here and in processes that start meanwhile."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
