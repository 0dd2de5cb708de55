"""One rank: join the world, call the function, leave; and what a rank that we started does around that.

Every way of starting ends in `run_here`: ranks that `launch/supervisor.py` started, ranks of torchrun or
srun, and the single rank of a plain `tide train`. Before anything else the ranks of a world make sure that no
two of them hold the same GPU. A rank cannot know by itself: tasks of srun may each see one GPU that is their
own, or all see the same one, and look alike; NCCL would say so at the first collective, minutes later and in
its own words.

A started rank leads a session of its own, so that Ctrl-C of the terminal reaches only the parent (which
passes it on once), and so that the parent can end the rank together with what it started (megatron-core's
checkpoint writers) in one kill. It also watches its parent: when that is gone, however it went, the rank ends
itself; nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tide_megatron.platform import prepare_platform
from tide_megatron.platform.distributed import TIMEOUT_SECONDS, start_distributed, stop_distributed

import torch
import torch.distributed as dist

from tide_megatron.base.deadlines import NO_DEADLINES, Deadlines
from tide_megatron.base.device import Device, Ranks, Wanted, choose_device, read_ranks
from tide_megatron.base.disk import disk_faults
from tide_megatron.base.errors import ConfigError, TideError, causes
from tide_megatron.base.heartbeat import HEARTBEAT
from tide_megatron.base.log import start_log
from tide_megatron.base.startup import STARTUP
from tide_megatron.base.stop import StopFlag, end_with_parent, is_stop
from tide_megatron.launch.rendezvous import meet
from tide_megatron.launch.signals import STOPPED_CODE, leave, release_signals, watch_signals
from tide_megatron.launch.squeue import job_end
from tide_megatron.launch.watchdog import STACKS_SIGNAL, Life, answer_when_asked
from tide_megatron.parallel.collectives import gather_objects, own_share

log = logging.getLogger(__name__)

RankFunction = Callable[..., Any]
"""Called as `function(*args, device=Device, stop=StopFlag)` with the process world already joined."""

_LOST_PEER = re.compile(
    r"gloo/|NCCL|Connection (closed|reset) by peer|Connection refused|Broken pipe|recvValue failed"
    r"|^rank \d+ failed: "  # what `fail_together` tells the ranks without the bug
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank is to do."""

    function: RankFunction
    args: tuple[Any, ...] = ()
    """Picklable where ranks are started."""
    wanted: Wanted = "auto"
    """Device to choose."""
    timeout_seconds: float = TIMEOUT_SECONDS
    """How long a collective waits for a rank that never comes."""
    hang_seconds: float | None = None
    """How long a rank may stand still in a step before its launcher ends them all; None: nobody looks."""
    deadlines: Deadlines = NO_DEADLINES
    """Of phases in which it may do so for another time."""
    began: float = dataclasses.field(default_factory=time.monotonic)
    """When it was asked for on this machine, on the clock of `time.monotonic` (`base.startup`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A rank's regular end, with the function's value (the node's first rank's only, it may be large)."""

    value: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halted:
    """A rank's end by a request, before it had anything to save."""

    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """How a rank failed: `error` for a fault of the user's, else `text` with the traceback."""

    rank: int
    at_seconds: float
    """On the monotonic clock, which ranks of one machine share, so the earliest is the cause."""
    text: str
    error: TideError | None = None
    is_loss: bool = False
    """It was killed, or stood still."""
    is_echo: bool = False
    """Only the loss of another rank was seen."""

    @property
    def ending(self) -> Literal["fault", "lost", "failed"]:
        """What kind of end it is to other nodes."""
        if self.error is not None:
            return "fault"
        return "lost" if self.is_loss else "failed"

    @property
    def told(self) -> str:
        """Say it to other nodes."""
        return f"rank {self.rank}: {self.text if self.error is None else self.error}"


def work(
    rank: int, local_rank: int, job: Job, environment: Mapping[str, str], report: Connection, life: Life
) -> None:
    """Run one started rank to its end and send how it ended. Called once, in a fresh process.

    Args:
        rank: this one's number.
        local_rank: its number on this node.
        job: what to do.
        environment: the parent's variables, and where the world meets: a rank forked from a server has the
            server's.
        report: the parent's pipe.
        life: where it shows the parent that it lives.
    """
    os.setsid()
    _show(life)
    end_with_parent(lambda: os.killpg(0, signal.SIGKILL))  # this rank and everything it started
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(local_rank))
    start_log(rank)
    with watch_signals(is_supervised=True) as stop:
        # No teardown at an early end: it could wait for ranks that are stuck, which should notice the loss.
        try:
            release_signals()
            value = run_here(job, read_ranks(), stop)
            report.send(Done(value=value if local_rank == 0 else None))
        except BaseException as error:
            if is_stop(error):
                report.send(Halted(reason=str(stop.reason)))
                leave(STOPPED_CODE)
            report.send(_failure(rank, error))
            leave(1)


def _show(life: Life) -> None:
    """Show what this rank is at from now on, and write its stacks when asked."""
    HEARTBEAT.show(life.pulse)
    if life.stacks:
        file = Path(life.stacks).open("w", encoding="utf-8")  # noqa: SIM115 - open as long as the process
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
        threading.Thread(target=answer_when_asked, args=(life,), name="asked", daemon=True).start()


def _failure(rank: int, error: BaseException) -> Failure:
    return Failure(
        rank=rank,
        at_seconds=time.monotonic(),
        text="".join(traceback.format_exception(error)),
        error=error if isinstance(error, TideError) else None,
        is_echo=is_echo(error),
    )


def run_here(job: Job, ranks: Ranks | None, stop: StopFlag) -> Any:
    """Join the world, call the job's function, leave the world; return what the function returned.

    All ranks call it together. After an error a world of several ranks is left as it is, for leaving it could
    wait for ranks that are stuck; the process ends soon.

    Args:
        job: what to do.
        ranks: this process's place; None for a world of one.
        stop: handed to the function.

    Raises:
        ConfigError: before the function is called, for a device that cannot be had, or a place where ranks
            cannot meet.
        RanksFailed: not all ranks came.
        Stopped: a stop signal, before there was anything to save.
    """
    STARTUP.begin(job.began)
    STARTUP.until_now("imports")
    device = choose_device(job.wanted)
    _refuse_seen_gpus(device)
    try:
        with stop.ending():
            with STARTUP("rendezvous"):
                store = None if ranks is None else meet(ranks, job.timeout_seconds)
            with STARTUP("world"):
                start_distributed(device, ranks, timeout_seconds=job.timeout_seconds, store=store)
                device = agree_on_gpus(device)
        if ranks is None or ranks.rank == 0:
            stop.ends_at = job_end()
        with disk_faults(kind=TideError):
            value = job.function(*job.args, device=device, stop=stop)
    except BaseException:
        if ranks is None:
            stop_distributed()
        raise
    stop_distributed()
    return value


def _refuse_seen_gpus(device: Device) -> None:
    """Refuse a run on the CPU in a process where megatron-core would use the GPUs that it sees."""
    if device.type == "cpu" and not prepare_platform().redirected_to_cpu:
        raise ConfigError(
            "device: 'cpu' is asked of ranks that see GPUs, which megatron-core would use; hide them: put "
            "CUDA_VISIBLE_DEVICES= (empty) before the command that starts the ranks"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A rank's GPU."""

    identity: str
    """Equal where NCCL would find the same GPU twice."""
    capability: tuple[int, int]
    name: str


def agree_on_gpus(device: Device) -> Device:
    """Return the device with what every rank's GPU can do. All ranks of the world call it together.

    Where ranks have different GPUs, it is the weakest one's name and capability, so that all choose alike.

    Raises:
        ConfigError: on every rank, when two of them hold the same GPU.
    """
    if device.type == "cpu":
        return device
    assert device.capability is not None, "a chosen GPU has a capability"
    own = Gpu(identity=_identity(device), capability=device.capability, name=device.name)
    agreed = agreed_on(device, gather_objects(own))
    if not agreed.has_bf16:
        log.info("%s has no bf16: precision auto is fp32 in this run", agreed.described)
    return agreed


def agreed_on(device: Device, gpus: Sequence[Gpu]) -> Device:
    """Do the arithmetic of `agree_on_gpus` over the GPUs of all ranks, in their order. Not a collective."""
    for gpu in gpus:
        sharing = [rank for rank, other in enumerate(gpus) if other.identity == gpu.identity]
        if len(sharing) > 1:
            raise ConfigError(
                f"ranks {sharing} were given the same GPU, {gpu.name}, which NCCL refuses "
                '("Duplicate GPU detected"); give each its own (srun --gpus-per-task=1), start fewer ranks, '
                "or set device=cpu"
            )
    weakest = min(gpus, key=lambda gpu: gpu.capability)
    return dataclasses.replace(device, capability=weakest.capability, name=weakest.name)


def _identity(device: Device) -> str:
    """Name the GPU as NCCL tells GPUs apart; both of these variables are set to share one on purpose."""
    uuid = torch.cuda.get_device_properties(device.index).uuid
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") == "1":
        return f"rank {own_share()[0]}"
    return f"{os.environ.get('NCCL_HOSTID', '')} {uuid}"


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another rank went away.

    gloo, NCCL and the store have no common class for that, so messages are read; a wrong guess only changes
    which of two failures is reported first.
    """
    return any(
        isinstance(link, dist.DistError) or (isinstance(link, RuntimeError) and _LOST_PEER.search(str(link)))
        for link in causes(error)
    )
