"""Start ranks on this node, look after them, and return rank 0's value.

The supervisor is our own, over Python's multiprocessing, because torch's two launchers do not do what a user
needs when something goes wrong (read in torch 2.13): `elastic_launch` and `start_processes` send SIGTERM and
wait 30 seconds before they kill a rank that is stuck in a collective (a run that listens to SIGTERM never
dies of it), name the failing rank with the lowest number rather than the first, and turn a Ctrl-C into that
same 30-second shutdown. Ours:

- the first failure is the one reported; ranks that only lost their peers are echoes and rank last;
- after a failure the others have two seconds to unwind, then they are killed with all they started;
- a fault of the user's (`TideError`) is raised again here as itself, once; a bug as `RanksFailed` with its
  traceback;
- stop signals are passed on; ranks that trained nothing yet end, the others get `grace_seconds` to save and
  return; a second signal kills at once;
- ranks end when this process is gone, even by SIGKILL (`launch/worker.py`);
- on several nodes each has a supervisor, and they pass on stops and the first failure (`launch/nodes.py`).

Left out: restarts, which SLURM does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

from tide_megatron.base.device import Wanted, check_gpus, choose_kind
from tide_megatron.base.errors import RanksFailed, RanksLost, TideError
from tide_megatron.base.stop import Stopped
from tide_megatron.launch.lost_hosts import own_host
from tide_megatron.launch.nodes import LISTEN_SECONDS, Nodes, Word
from tide_megatron.launch.rendezvous import own_store
from tide_megatron.launch.signals import LEAVE_SIGNAL, STOPPED_CODE, relayed_to, signals_held
from tide_megatron.launch.watchdog import Life, Watchdog
from tide_megatron.launch.worker import Done, Failure, Halted, Job, work

log = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0
"""After a failure: how long the other ranks may take to fail too, clean up and report."""
LEAVE_SECONDS = 1.0
"""Before a rank is killed: how long it may take to say farewell."""
EXIT_SECONDS = 10.0
"""After a rank's last word: how long its process may take to end."""
PRELOADED = ("tide_megatron.platform", "tide_megatron.train.loop", "torch._dynamo")
"""What ranks on CPU find imported already; torch's optimizers bring in the last one, at 2 s a rank."""
_THREADS = "OMP_NUM_THREADS"
_COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
"""Else every rank starts a process per core, at most 32, to compile in."""
_NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}


def supervise(job: Job, num_ranks: int, grace_seconds: float, nodes: Nodes | None = None) -> Any:
    """Start ranks on this node, wait until they end, and return its first rank's value.

    Args:
        job: what each of them does.
        num_ranks: how many, on this node.
        grace_seconds: after a stop signal: how long the ranks may take to save and return.
        nodes: the line to the launchers of the other nodes; None: there are none.

    Raises:
        TideError: what one of the ranks raised, with the rank named.
        RanksFailed: a rank had a bug, was killed, or did not stop in time.
        Stopped: a stop signal, before there was anything to save.
        KeyboardInterrupt: a second stop signal.
    """
    if choose_kind(job.wanted) == "cuda":
        check_gpus(num_ranks)
    store = None
    if nodes is None:
        store = own_store()  # lives as long as this function
        meeting = _meeting_point(num_ranks, store.port)
    else:
        meeting = _meeting_points(num_ranks, nodes)
    ranks: list[_Rank] = []
    relay = _Relay(ranks)
    try:
        with relayed_to(relay.hear, relay.abort), Watchdog(job.hang_seconds, job.deadlines) as watchdog:
            _start(ranks, job, num_ranks, _environment(num_ranks, job.wanted) | meeting, watchdog)
            relay.pass_on()  # what was heard before there were ranks
            _wait(ranks, relay, grace_seconds, nodes, watchdog)
            first = _first_word(ranks, nodes)
    finally:
        _end(ranks)
        if nodes is not None:
            nodes.leave()
    if relay.is_aborted:
        raise KeyboardInterrupt
    return _value(ranks, relay, grace_seconds, first)


def _value(ranks: Sequence[_Rank], relay: _Relay, grace_seconds: float, first: Word | None) -> Any:
    """Return the first rank's value, or raise why there is none."""
    failures = [rank.outcome for rank in ranks if isinstance(rank.outcome, Failure)]
    is_undone = failures or any(rank.outcome is None for rank in ranks)
    if first is not None and is_undone and all(failure.is_echo for failure in failures):
        raise first.error
    halted = [rank.outcome for rank in ranks if isinstance(rank.outcome, Halted)]
    if halted:
        raise Stopped(f"stopped by {relay.heard.name if relay.heard else halted[0].reason}")
    if failures:
        raise first_failure(failures, ranks[0].world_size)
    late = [rank.number for rank in ranks if rank.outcome is None]
    if late:
        assert relay.heard is not None, "without a failure only a stop signal sets a deadline"
        raise RanksFailed(
            f"{relay.heard.name}: ranks {late} did not finish within {grace_seconds:g} seconds and were "
            "killed; the run's last checkpoint is as it was"
        )
    assert isinstance(ranks[0].outcome, Done), "a rank that neither failed nor is late is done"
    return ranks[0].outcome.value


def _start(
    ranks: list[_Rank], job: Job, num_ranks: int, environment: Mapping[str, str], watchdog: Watchdog
) -> None:
    """Start every rank; stop signals wait until they can be passed on to all of them."""
    log.info("starting %d ranks on this node with %s thread(s) each", num_ranks, environment[_THREADS])
    with starting(job.wanted) as context:
        first, world_size = int(environment["GROUP_RANK"]) * num_ranks, int(environment["WORLD_SIZE"])
        for local in range(num_ranks):
            mine, theirs = context.Pipe(duplex=False)
            number = first + local
            life = watchdog.life(context, number)
            process = context.Process(
                target=work, args=(number, local, job, environment, theirs, life), name=f"rank {number}"
            )
            process.start()
            theirs.close()
            rank = _Rank(number=number, world_size=world_size, process=process, report=mine, life=life)
            ranks.append(rank)


@contextlib.contextmanager
def starting(wanted: Wanted) -> Iterator[ForkServerContext | SpawnContext]:
    """Hold stop signals and set what must stand early while processes are started; give the way to do it.

    The fork server lives on and gives its hold on signals to all that come of it: it must be started here.
    """
    resource_tracker.ensure_running()  # else the first start of a process would end the hold on signals
    with signals_held(), start_environment(wanted):
        yield start_method(wanted)


def start_method(wanted: Wanted) -> ForkServerContext | SpawnContext:
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
def start_environment(wanted: Wanted) -> Iterator[None]:
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


def _meeting_point(num_ranks: int, port: int) -> dict[str, str]:
    """Return where the ranks meet: at this process's store, so that no port has to be guessed."""
    return {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _meeting_points(num_ranks: int, nodes: Nodes) -> dict[str, str]:
    """Return the same for several nodes, whose launchers have met at node 0's store."""
    place = nodes.place
    return _meeting_point(num_ranks, place.port) | {
        "WORLD_SIZE": str(place.world_size * num_ranks),
        "GROUP_RANK": str(place.rank),
        "MASTER_ADDR": place.address,
    }


@dataclasses.dataclass(kw_only=True)
class _Rank:
    """A started rank as its parent sees it."""

    number: int
    world_size: int
    process: BaseProcess
    report: connection.Connection
    life: Life
    outcome: Done | Halted | Failure | None = None

    def look(self) -> None:
        """Take the rank's report, or note that it died without one."""
        has_ended = self.process.exitcode is not None  # asked first: a report may come just before the end
        if self.report.poll():
            with contextlib.suppress(EOFError, OSError):
                self.outcome = self.report.recv()
        if has_ended and self.outcome is None and self.process.exitcode == STOPPED_CODE:
            self.outcome = Halted(reason="a signal")  # it was deaf and could not report
        if has_ended and self.outcome is None:
            self.fail(f"it {_end_in_words(self.process.exitcode)}", is_loss=(self.process.exitcode or 0) < 0)

    def fail(self, text: str, *, is_loss: bool) -> None:
        """Note how it failed, seen from here."""
        self.outcome = Failure(rank=self.number, at_seconds=time.monotonic(), text=text, is_loss=is_loss)

    @property
    def pid(self) -> int:
        """Its number, and that of the session that it leads."""
        assert self.process.pid is not None, "only started ranks are kept"
        return self.process.pid

    def kill(self) -> None:
        """End the rank and everything it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()  # it may not lead its session yet


class _Relay:
    """Passes stop signals of this process on to the ranks; the second one ends them.

    `hear` and `abort` are called from the thread that listens (`launch/signals.py`).
    """

    def __init__(self, ranks: Sequence[_Rank]) -> None:
        self.ranks = ranks
        self.heard: signal.Signals | None = None
        self.heard_seconds = 0.0
        self.is_aborted = False

    def hear(self, number: int) -> None:
        """Take the first request."""
        self.heard_seconds, self.heard = time.monotonic(), signal.Signals(number)
        self.pass_on()

    def abort(self) -> None:
        """Take the second one: `supervise` ends the ranks, at once."""
        self.is_aborted = True

    def pass_on(self) -> None:
        """Tell the ranks that there are; telling them twice is harmless."""
        for rank in list(self.ranks):
            if self.heard is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, self.heard)


def _wait(
    ranks: Sequence[_Rank], relay: _Relay, grace_seconds: float, nodes: Nodes | None, watchdog: Watchdog
) -> None:
    """Return when every rank has an outcome and ended, or when the time it may still take is over."""
    deadline = float("inf")
    while waiting := [rank for rank in ranks if rank.outcome is None]:
        # The poll is for ranks whose children keep the pipes open, for deadlines, and for other nodes.
        connection.wait(
            [each for rank in waiting for each in (rank.report, rank.process.sentinel)], timeout=0.2
        )
        for rank in waiting:
            rank.look()
        if relay.heard is None and (hung := watchdog.look([one for one in waiting if one.outcome is None])):
            next(rank for rank in waiting if rank.number == hung[0]).fail(hung[1], is_loss=True)
        now = time.monotonic()
        has_failed = nodes is not None and _exchange(ranks, relay, nodes)
        if relay.heard is not None:
            deadline = min(deadline, relay.heard_seconds + grace_seconds)
        if has_failed or any(isinstance(rank.outcome, Failure | Halted) for rank in ranks):
            deadline = min(deadline, now + SETTLE_SECONDS)
        if now > deadline or relay.is_aborted:
            return
    if all(isinstance(rank.outcome, Done) for rank in ranks):
        end = time.monotonic() + EXIT_SECONDS
        for rank in ranks:
            rank.process.join(max(0.0, end - time.monotonic()))


def _exchange(ranks: Sequence[_Rank], relay: _Relay, nodes: Nodes) -> bool:
    """Tell the other nodes of a request or an end here, and take up theirs; say whether another one ended."""
    for outcome in (rank.outcome for rank in ranks):
        if isinstance(outcome, Halted):
            nodes.tell_end("halted", outcome.reason)
        if isinstance(outcome, Failure) and not outcome.is_echo:
            nodes.tell_end(outcome.ending, outcome.told)
    if relay.heard is not None:
        nodes.tell_stop(relay.heard.name)
    nodes.look()
    word = nodes.stop()
    if word is not None and relay.heard is None:
        log.warning("node %d was asked to stop by %s, so this one stops too", word.node, word.text)
        relay.hear(signal.Signals[word.text])
    return nodes.end() is not None


def _first_word(ranks: Sequence[_Rank], nodes: Nodes | None) -> Word | None:
    """Return why another node ended first, where it is not known whether ranks here only lost their peers.

    Where no node says why, the one that gives no sign is the cause; node 0 knows it, and tells the others.
    """
    if nodes is None:
        return None
    failures = [rank.outcome for rank in ranks if isinstance(rank.outcome, Failure)]
    is_echo = bool(failures) and all(failure.is_echo for failure in failures)
    patience = 2 * LISTEN_SECONDS + SETTLE_SECONDS * (2 if nodes.place.rank else 1)
    end = time.monotonic() + patience * is_echo
    nodes.look(at_once=True)
    while nodes.end() is None and time.monotonic() < end:
        time.sleep(0.1)
        nodes.look(at_once=True)
    if is_echo:
        nodes.miss_peers()
    if failures:
        nodes.tell_end(failures[0].ending, failures[0].told)
    return nodes.end()


def _end(ranks: Sequence[_Rank]) -> None:
    """End all ranks with all that they started; those that stand somewhere may say farewell for a moment."""
    standing = [rank for rank in ranks if rank.process.exitcode is None]
    for rank in standing:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, LEAVE_SIGNAL)
    end = time.monotonic() + LEAVE_SECONDS
    for rank in standing:
        rank.process.join(max(0.0, end - time.monotonic()))
    for rank in ranks:
        rank.kill()
        rank.process.join()


def _end_in_words(code: int | None) -> str:
    assert code is not None, "asked of ranks that ended"
    if code >= 0:
        return f"ended with exit code {code} without a report"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def first_failure(failures: Sequence[Failure], world_size: int) -> TideError | RanksFailed:
    """Choose the failure that caused the others, as the exception to raise.

    When one rank fails, the others fail after it, for their connections close. The earliest failure that is
    not such an echo is the cause.

    Args:
        failures: at least one; the lost connections that follow a failure are marked as echoes.
        world_size: ranks of the run.
    """
    first = min(failures, key=lambda failure: (failure.is_echo, failure.at_seconds))
    who = f"rank {first.rank} of {world_size}"
    if first.error is None:
        text = f"{who} failed first: {first.text}"
        return RanksLost(text, own_host()) if first.is_loss else RanksFailed(text)
    everybody = sum(str(failure.error) == str(first.error) for failure in failures) == world_size
    return first.error if everybody else type(first.error)(f"{first.error} (seen by {who})")
