"""Run one function on every rank of a run, whoever starts the ranks.

- torchrun or srun started us: this process is one rank already.
- one rank: run it here, unless it is to run on the CPU and this process sees GPUs: megatron-core has been
  prepared for them (`platform`), so a process that does not see them is started.
- several ranks on this node: start and supervise them.

The supervisor is 100 lines of our own over torch's multiprocessing, because torch's two launchers do not do
what a user needs when something goes wrong (read in torch 2.13): `elastic_launch` and `start_processes` send
SIGTERM and wait 30 seconds before they kill a rank that is stuck in a collective (a run that listens to
SIGTERM never dies of it), name the failing rank with the lowest number rather than the first, and turn a
Ctrl-C into that same 30-second shutdown. Ours:

- the first failure is the one reported; ranks that only lost their peers are echoes and rank last;
- after a failure the others have two seconds to unwind, then they are killed with all they started;
- a fault of the user's (`TideError`) is raised again here as itself, once; a bug as `RanksFailed` with its
  traceback;
- stop signals are passed on; ranks get `grace_seconds` to save and return; a second signal kills at once;
- ranks end when this process is gone, even by SIGKILL (`launch/worker.py`).

Left out: restarts and several nodes (torchrun and SLURM do those).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

from tide_megatron.platform import prepare_platform
from tide_megatron.platform.distributed import TIMEOUT_SECONDS

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import record

from tide_megatron.base.device import Ranks, Wanted, check_gpus, choose_kind, read_ranks
from tide_megatron.base.errors import ConfigError, TideError
from tide_megatron.base.log import start_log
from tide_megatron.launch.failure import Failure, RanksFailed, first_failure
from tide_megatron.launch.here import RankFunction, is_echo, run_here
from tide_megatron.launch.signals import heard_by, signals_held, watch_signals
from tide_megatron.launch.worker import Done, Job, work

log = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0
"""After a failure: how long the other ranks may take to fail too, clean up and report."""
GRACE_SECONDS = 120.0
"""After a stop signal: how long the ranks may take to save and return."""
EXIT_SECONDS = 10.0
"""After a rank's last word: how long its process may take to end."""
PRELOADED = ("tide_megatron.platform", "tide_megatron.train.loop")
"""What ranks on CPU find imported already."""
_THREADS = "OMP_NUM_THREADS"
_COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
"""Else every rank starts a process per core, at most 32, to compile in."""
_NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}


def run_ranks(
    function: RankFunction,
    args: tuple[Any, ...] = (),
    num_ranks: int | None = None,
    device: Wanted = "auto",
    *,
    grace_seconds: float = GRACE_SECONDS,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Any:
    """Call `function(*args, device=..., stop=...)` on every rank and return rank 0's value.

    Under torchrun or srun each process calls this and gets its own value. Else the calling script must guard
    its entry with `if __name__ == "__main__":`, for fresh ranks import it again.

    Args:
        function: importable; called with the process world joined. It polls `stop.requested` between steps.
        args: picklable positional arguments.
        num_ranks: how many ranks; None takes what torchrun or srun started, else one.
        device: `auto`, `cpu` or `cuda`.
        grace_seconds: time for saving after a stop signal.
        timeout_seconds: how long a collective waits for a rank that never comes.

    Raises:
        TideError: what one of the ranks raised, with the rank named.
        RanksFailed: a rank had a bug (its traceback is in the message) or was killed.
        KeyboardInterrupt: stopped before the ranks could finish in order.
    """
    world_size, given = num_ranks_for(num_ranks), read_ranks()
    if given is not None:
        return _run_given(function, args, device, given, timeout_seconds)
    if world_size == 1 and not _must_hide_gpus(device):
        with watch_signals() as stop:
            return run_here(
                function, args, wanted=device, ranks=None, stop=stop, timeout_seconds=timeout_seconds
            )
    return _run_started(function, args, world_size, device, grace_seconds, timeout_seconds)


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
        raise ConfigError(
            f"ranks: {wanted} were asked for, but torchrun or srun started {given.world_size}; "
            f"leave the number out or start {wanted} processes"
        )
    return given.world_size if given is not None else wanted or 1


def _run_given(
    function: RankFunction, args: tuple[Any, ...], wanted: Wanted, ranks: Ranks, timeout_seconds: float
) -> Any:
    """Run as the rank that torchrun or srun made this process; torchrun's summary learns the first error."""
    start_log(ranks.rank)
    try:
        with watch_signals() as stop:
            return record(run_here)(
                function, args, wanted=wanted, ranks=ranks, stop=stop, timeout_seconds=timeout_seconds
            )
    except TideError as error:
        raise type(error)(f"[rank {ranks.rank} of {ranks.world_size}] {error}") from error
    except Exception as error:
        if is_echo(error):
            raise RanksFailed(f"rank {ranks.rank} of {ranks.world_size} lost its peers: {error}") from error
        raise


@dataclasses.dataclass(kw_only=True)
class _Rank:
    """A started rank as its parent sees it."""

    number: int
    process: BaseProcess
    report: connection.Connection
    outcome: Done | Failure | None = None

    def look(self) -> None:
        """Take the rank's report, or note that it died without one."""
        has_ended = self.process.exitcode is not None  # asked first: a report may come just before the end
        if self.report.poll():
            with contextlib.suppress(EOFError, OSError):
                self.outcome = self.report.recv()
        if has_ended and self.outcome is None:
            text = f"it {_end_in_words(self.process.exitcode)}"
            self.outcome = Failure(rank=self.number, at_seconds=time.time(), text=text)

    def kill(self) -> None:
        """End the rank and everything it started, at once."""
        assert self.process.pid is not None, "only started ranks are kept"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it may not lead its session yet


class _Relay:
    """Passes stop signals of this process on to the ranks; the second one kills them."""

    def __init__(self, ranks: Sequence[_Rank]) -> None:
        self.ranks = ranks
        self.heard: signal.Signals | None = None
        self.heard_seconds = 0.0
        self.is_aborted = False

    def hear(self, number: int) -> None:
        """Handle one signal (called from a signal handler: it must not log)."""
        if self.heard is None:
            self.heard, self.heard_seconds = signal.Signals(number), time.monotonic()
            self.pass_on()
        else:
            self.is_aborted = True
            for rank in self.ranks:
                rank.kill()

    def pass_on(self) -> None:
        """Tell the ranks that run; telling them twice is harmless."""
        for rank in self.ranks:
            if self.heard is not None and rank.process.exitcode is None and rank.process.pid is not None:
                os.kill(rank.process.pid, self.heard)


def _run_started(
    function: RankFunction,
    args: tuple[Any, ...],
    num_ranks: int,
    wanted: Wanted,
    grace_seconds: float,
    timeout_seconds: float,
) -> Any:
    """Start ranks on this node, supervise them, and return rank 0's value."""
    if choose_kind(wanted) == "cuda":
        check_gpus(num_ranks)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = Job(
        function=function,
        args=args,
        wanted=wanted,
        world_size=num_ranks,
        port=store.port,
        environment=_environment(num_ranks, wanted),
        timeout_seconds=timeout_seconds,
    )
    ranks: list[_Rank] = []
    relay = _Relay(ranks)
    try:
        with heard_by(relay.hear):
            _start(ranks, job)
            relay.pass_on()  # what was heard before there were ranks
            _wait(ranks, relay, grace_seconds)
    finally:
        for rank in ranks:
            rank.kill()
            rank.process.join()
    if relay.is_aborted:
        raise KeyboardInterrupt
    failures = [rank.outcome for rank in ranks if isinstance(rank.outcome, Failure)]
    if failures:
        raise first_failure(failures, num_ranks)
    late = [rank.number for rank in ranks if rank.outcome is None]
    if late:
        assert relay.heard is not None, "without a failure only a stop signal sets a deadline"
        raise RanksFailed(
            f"{relay.heard.name}: ranks {late} did not finish within {grace_seconds:g} seconds and were "
            "killed; the run's last checkpoint is as it was"
        )
    assert isinstance(ranks[0].outcome, Done), "a rank that neither failed nor is late is done"
    return ranks[0].outcome.value


def _start(ranks: list[_Rank], job: Job) -> None:
    """Start every rank; stop signals wait until all of them can be told."""
    log.info(
        "starting %d ranks on this node with %s thread(s) each", job.world_size, job.environment[_THREADS]
    )
    resource_tracker.ensure_running()  # else the first start of a process would end the hold on signals
    with signals_held(), _start_environment(job.wanted):
        context = _start_method(job.wanted)
        for number in range(job.world_size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(number, job, theirs), name=f"rank {number}")
            process.start()
            theirs.close()
            ranks.append(_Rank(number=number, process=process, report=mine))


def _start_method(wanted: Wanted) -> ForkServerContext | SpawnContext:
    """Choose how processes start: fresh ones for CUDA, which survives no fork; else forks of a server.

    The server has imported torch and megatron-core once: a rank starts in 0.1 s instead of 4 s of CPU, and
    shares those pages. It is a fresh process itself, that sees no GPUs, whatever this one has done with them.
    """
    if choose_kind(wanted) == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _start_environment(wanted: Wanted) -> Iterator[None]:
    """Set what must stand before Python and torch are loaded; ranks get their own number of threads later.

    This process asks CUDA nothing meanwhile: its answer would stay as it is for good.
    """
    # A thread pool would not survive the server's forks; megatron-core and torch warn once per rank and
    # import.
    defaults = {"PYTHONWARNINGS": "ignore", **_COMPILERS}
    early = {name: os.environ.get(name, value) for name, value in defaults.items()}
    early |= {_THREADS: "1", **_hiding(wanted)}
    before = {name: os.environ.get(name) for name in early}
    os.environ.update(early)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _environment(num_ranks: int, wanted: Wanted) -> dict[str, str]:
    """Return this process's environment, with the cores shared among the ranks unless it says otherwise."""
    share = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    return {_THREADS: str(share), **_COMPILERS, **os.environ, **_hiding(wanted)}


def _hiding(wanted: Wanted) -> dict[str, str]:
    """Return the variables that hide the GPUs from ranks on the CPU."""
    return _NO_GPUS if wanted == "cpu" else {}


def _wait(ranks: Sequence[_Rank], relay: _Relay, grace_seconds: float) -> None:
    """Return when every rank has an outcome and ended, or when the time it may still take is over."""
    deadline = float("inf")
    while waiting := [rank for rank in ranks if rank.outcome is None]:
        # The poll is for ranks whose children keep the pipes open, and for deadlines.
        connection.wait(
            [each for rank in waiting for each in (rank.report, rank.process.sentinel)], timeout=0.2
        )
        for rank in waiting:
            rank.look()
        now = time.monotonic()
        if relay.heard is not None:
            deadline = min(deadline, relay.heard_seconds + grace_seconds)
        if any(isinstance(rank.outcome, Failure) for rank in ranks):
            deadline = min(deadline, now + SETTLE_SECONDS)
        if now > deadline or relay.is_aborted:
            return
    if all(isinstance(rank.outcome, Done) for rank in ranks):
        end = time.monotonic() + EXIT_SECONDS
        for rank in ranks:
            rank.process.join(max(0.0, end - time.monotonic()))


def _end_in_words(code: int | None) -> str:
    assert code is not None, "asked of ranks that ended"
    if code >= 0:
        return f"ended with exit code {code} without a report"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
