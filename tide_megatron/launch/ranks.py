"""Run one function on every rank of a run, whoever starts the ranks.

- torchrun or srun started us: this process is one rank already.
- one rank: run it here, unless it is to run on the CPU and this process sees GPUs: megatron-core has been
  prepared for them (`platform`), so a process that does not see them is started.
- several ranks on this node, or on each of several whose launchers are this command: start and supervise
  them (`launch/supervisor.py`, `launch/nodes.py`).
"""

from __future__ import annotations

import os
import time
from typing import Any

from tide_megatron.platform import prepare_platform
from tide_megatron.platform.distributed import TIMEOUT_SECONDS

from torch.distributed.elastic.multiprocessing.errors import record

from tide_megatron.base.deadlines import NO_DEADLINES, Deadlines
from tide_megatron.base.device import Ranks, Wanted, read_ranks
from tide_megatron.base.errors import ConfigError, RanksFailed, RanksLost, TideError
from tide_megatron.base.log import start_log
from tide_megatron.base.startup import STARTUP
from tide_megatron.base.stop import StopFlag, Stopped
from tide_megatron.launch.lost_hosts import note_lost_host
from tide_megatron.launch.nodes import Nodes, meet_nodes, read_node
from tide_megatron.launch.signals import watch_signals
from tide_megatron.launch.supervisor import supervise
from tide_megatron.launch.watchdog import watching_itself
from tide_megatron.launch.worker import Job, RankFunction, is_echo, run_here

GRACE_SECONDS, JOB_GRACE_SECONDS = 120.0, 3600.0
"""After a stop signal: how long ranks may take to save and return; in a job SLURM's own limit is nearer."""
SAME_REQUEST_SECONDS = 1.0
"""So far apart may one request reach the ranks of torchrun and srun."""


def run_ranks(
    function: RankFunction,
    args: tuple[Any, ...] = (),
    num_ranks: int | None = None,
    device: Wanted = "auto",
    *,
    ranks_per_node: int | None = None,
    grace_seconds: float | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    hang_seconds: float | None = None,
    deadlines: Deadlines = NO_DEADLINES,
) -> Any:
    """Call `function(*args, device=..., stop=...)` on every rank and return rank 0's value.

    Under torchrun or srun each process calls this and gets its own value. Else the calling script must guard
    its entry with `if __name__ == "__main__":`, for fresh ranks import it again.

    Args:
        function: importable; called with the process world joined. A stop signal unwinds it, except where it
            says that it answers itself (`base/stop.py`).
        args: picklable positional arguments.
        num_ranks: how many ranks; None takes what torchrun or srun started, else one.
        device: `auto`, `cpu` or `cuda`.
        ranks_per_node: start so many here, as the launcher of one of the nodes (`launch.nodes.read_node`).
        grace_seconds: time for saving after a stop signal; None: 120 s, in a job of SLURM's an hour.
        timeout_seconds: how long a collective waits for a rank that never comes.
        hang_seconds: how long a rank may stand still in a step; None: nobody looks.
        deadlines: of phases in which it may do so for another time.

    Raises:
        TideError: what one of the ranks raised, with the rank named.
        RanksFailed: a rank had a bug; its traceback is in the message.
        RanksLost: (a RanksFailed) a rank was killed, or stood still.
        Stopped: a stop signal, before the ranks had anything to save.
        KeyboardInterrupt: (not `Stopped`) a second stop signal.
    """
    job = Job(
        function=function,
        args=args,
        wanted=device,
        timeout_seconds=timeout_seconds,
        hang_seconds=hang_seconds,
        deadlines=deadlines,
        began=STARTUP.command_began or time.monotonic(),
    )
    if grace_seconds is None:
        grace_seconds = JOB_GRACE_SECONDS if "SLURM_JOB_ID" in os.environ else GRACE_SECONDS
    if ranks_per_node is not None:
        return _run_nodes(job, num_ranks, ranks_per_node, grace_seconds)
    world_size, given = num_ranks_for(num_ranks), read_ranks()
    with watch_signals() as stop:
        if given is not None:
            return _run_given(job, given, stop)
        if world_size > 1 or _must_hide_gpus(device):
            return supervise(job, world_size, grace_seconds)
        return run_here(job, None, stop)


def _run_nodes(job: Job, num_ranks: int | None, ranks_per_node: int, grace_seconds: float) -> Any:
    """Run as the launcher of one node; see `run_ranks`."""
    place = read_node()
    count = _world_of(ranks_per_node, place, num_ranks)
    with watch_signals() as stop:
        if place is None:
            return _supervise_noting(job, count, grace_seconds, None)
        with stop.ending():
            hang_seconds = job.hang_seconds and job.deadlines.shortest_wait(job.hang_seconds)
            nodes = meet_nodes(place, job.timeout_seconds, hang_seconds)
        return _supervise_noting(job, ranks_per_node, grace_seconds, nodes)


def _supervise_noting(job: Job, num_ranks: int, grace_seconds: float, nodes: Nodes | None) -> Any:
    """Supervise, and note the host of a rank that was lost."""
    try:
        return supervise(job, num_ranks, grace_seconds, nodes)
    except RanksLost as loss:
        note_lost_host(loss.host)
        raise


def planned_ranks(num_ranks: int | None, ranks_per_node: int | None) -> int:
    """Return how many ranks `run_ranks` would have all in all, with the same arguments.

    Raises:
        ConfigError: as it would.
    """
    if ranks_per_node is None:
        return num_ranks_for(num_ranks)
    return _world_of(ranks_per_node, read_node(), num_ranks)


def _world_of(ranks_per_node: int, place: Ranks | None, wanted: int | None) -> int:
    if ranks_per_node < 1:
        raise ConfigError(f"--ranks-per-node: {ranks_per_node} is not a number of ranks; use 1 or more")
    nodes = 1 if place is None else place.world_size
    count = nodes * ranks_per_node
    if wanted not in (None, count):
        raise ConfigError(
            f"--ranks {wanted}, but {nodes} node(s) of --ranks-per-node {ranks_per_node} have {count}; give "
            "one of the two"
        )
    return count


def _must_hide_gpus(wanted: Wanted) -> bool:
    """Say whether ranks on the CPU need processes in which the GPUs that this one sees are hidden."""
    return wanted == "cpu" and not prepare_platform().redirected_to_cpu


def num_ranks_for(wanted: int | None) -> int:
    """Return how many ranks a run will have: what torchrun or srun started, else what is wanted, else one.

    Raises:
        ConfigError: fewer than one, or another number than were started.
    """
    given = read_ranks()
    if wanted is not None and wanted < 1:
        raise ConfigError(f"ranks: {wanted} is not a number of ranks; use 1 or more")
    if given is not None and wanted not in (None, given.world_size):
        where, remedy = f"{wanted} ranks", f"start {wanted} processes of it"
        if wanted == 1:
            where, remedy = "1 rank", "run it once, without them"
        raise ConfigError(
            f"ranks: this command is to run on {where}, but torchrun or srun started {given.world_size} "
            f"processes of it; {remedy}, or leave --ranks out where it was said"
        )
    return given.world_size if given is not None else wanted or 1


def _run_given(job: Job, ranks: Ranks, stop: StopFlag) -> Any:
    """Run as the rank that torchrun or srun made this process; torchrun's summary learns the first error."""
    start_log(ranks.rank)
    try:
        with watching_itself(ranks.rank, job.hang_seconds, job.deadlines):
            return record(run_here)(job, ranks, stop)
    except TideError as error:
        raise type(error)(f"[rank {ranks.rank} of {ranks.world_size}] {error}") from error
    except Exception as error:
        if is_echo(error) and stop.answer == "end" and _hears_soon(stop):
            raise Stopped(f"stopped by {stop.reason}") from None  # the peers heard it a moment earlier
        if isinstance(error, RanksFailed) or not is_echo(error):
            raise
        raise RanksFailed(f"rank {ranks.rank} of {ranks.world_size} lost its peers: {error}") from error


def _hears_soon(stop: StopFlag) -> bool:
    """Give a request that ended other ranks a moment to come here too."""
    end = time.monotonic() + SAME_REQUEST_SECONDS
    while not stop.requested and time.monotonic() < end:
        time.sleep(0.05)
    return stop.requested
