"""Where ranks meet: a store at rank 0's address, and words about who has not come.

torch's own rendezvous waits in one library call, says nothing, and at the end names no rank. Here every rank
enters its number into the store and waits in Python, so that a signal is heard, a port that is taken or an
address that nobody answers is named as such, and rank 0 tells after two seconds whom it waits for.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
from typing import Literal

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from tide_megatron.base.device import Ranks
from tide_megatron.base.errors import ConfigError, RanksFailed, last_line

log = logging.getLogger(__name__)

PATIENCE_SECONDS, AGAIN_SECONDS = 2.0, 60.0
"""When a rank first says that it waits, and how often later."""
ANSWER_SECONDS = 30.0
"""So long may what listens at the address take to answer as a store does."""
_POLLS_SECONDS = (0.02, 0.5)
"""Between two looks: at first, and at most."""
# Set by torchrun and by `launch/supervisor.py`: who starts the ranks has the store, and rank 0 is one guest.
_AGENT_HAS_STORE, _RESTARTS = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", _RESTARTS)
Kind = Literal["rank", "node"]
"""Who meets: ranks, or the launchers of several nodes before they start theirs."""


def own_store() -> TCPStore:
    """Open a store for ranks of this machine alone, which no other machine can reach."""
    server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = server.getsockname()[1]
    return TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
    )


def meet(ranks: Ranks, timeout_seconds: float, kind: Kind = "rank") -> Store:
    """Return the store of all ranks once each has come to it. All ranks call it.

    Args:
        ranks: this process's place.
        timeout_seconds: how long to wait for a rank that never comes.
        kind: what `ranks` counts.

    Raises:
        ConfigError: the port is taken, or two processes say that they are the same rank.
        RanksFailed: somebody did not come in time; the message says who and where.
    """
    wait = _Wait(ranks, timeout_seconds, kind)
    store = _open(ranks, wait)
    store.set_timeout(datetime.timedelta(seconds=timeout_seconds))
    # Ranks of another job that come to this port by mistake must not be counted.
    prefix = "tide" if kind == "rank" else "tide-nodes"
    store = PrefixStore(f"{prefix}/" + ".".join(os.environ.get(name, "0") for name in _JOB), store)
    try:
        _come_together(ranks, store, wait)
    except RuntimeError as error:
        raise RanksFailed(
            f"{kind} {ranks.rank} of {ranks.world_size} lost {wait.where} while the {kind}s met there; why "
            f"is in the log of {kind} 0, or of what started it: {last_line(error)}"
        ) from error
    return store


def _come_together(ranks: Ranks, store: Store, wait: _Wait) -> None:
    """Enter this rank's number, and wait until all numbers are there."""
    if store.add(f"here/{ranks.rank}", 1) > 1:
        raise ConfigError(
            f"two processes came to {wait.where} as {wait.kind} {ranks.rank} of {ranks.world_size}; "
            f"each process needs a {'RANK' if wait.kind == 'rank' else 'NODE_RANK'} of its own"
        )
    if ranks.rank:
        while not store.check(["all"]):
            wait.pause("others have not come", is_told=False)
        return
    missing = list(range(ranks.world_size))
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        wait.pause(f"{_listed(missing, wait.kind)} not come")
    store.set("all", "1")


def _open(ranks: Ranks, wait: _Wait) -> Store:
    """Open the store's own end at rank 0, or a guest's elsewhere."""
    is_host = ranks.rank == 0 and os.environ.get(_AGENT_HAS_STORE) != str(True)
    while not is_host and (fault := _refusal(ranks.address, ranks.port)):
        wait.pause(f"nobody answers there yet ({fault}); is it {wait.kind} 0's machine, and is that up?")
    try:
        return TCPStore(
            ranks.address,
            ranks.port,
            ranks.world_size,
            is_master=is_host,
            timeout=datetime.timedelta(seconds=min(ANSWER_SECONDS, wait.timeout_seconds)),
            wait_for_workers=False,
            multi_tenant=is_host,
        )
    except RuntimeError as error:
        if is_host and "EADDRINUSE" in str(error):
            raise ConfigError(
                f"port {ranks.port} of this machine is taken by another program or run, so the ranks cannot "
                "meet there; put MASTER_PORT= and a free one before the command (torchrun: --master-port)"
            ) from None
        if is_host and "EACCES" in str(error):
            raise ConfigError(
                f"MASTER_PORT={ranks.port}: this port may not be listened at here; choose one above 1023"
            ) from None
        raise RanksFailed(
            f"rank {ranks.rank} of {ranks.world_size} cannot meet the others at {wait.where}: {error}"
        ) from error


def _refusal(address: str, port: int) -> str | None:
    """Return why nobody can be reached at an address; None where somebody can."""
    try:
        with socket.create_connection((address, port), timeout=PATIENCE_SECONDS):
            return None
    except OSError as fault:
        return fault.strerror or str(fault)


class _Wait:
    """One rank's patience: it pauses, speaks when it lasts, and ends."""

    def __init__(self, ranks: Ranks, timeout_seconds: float, kind: Kind) -> None:
        self.ranks, self.timeout_seconds, self.kind = ranks, timeout_seconds, kind
        self.where = f"{ranks.address}:{ranks.port}"
        self._start = time.monotonic()
        self._told = self._start + PATIENCE_SECONDS - AGAIN_SECONDS
        self._poll_seconds = _POLLS_SECONDS[0]

    def pause(self, why: str, *, is_told: bool = True) -> None:
        """Wait a moment.

        Args:
            why: what is waited for, behind "waiting for N ranks at ADDRESS:PORT: ".
            is_told: False where another rank says it.

        Raises:
            RanksFailed: it has lasted too long.
        """
        now = time.monotonic()
        words = f"{self.ranks.world_size} {self.kind}s at {self.where}: {why}"
        if now - self._start > self.timeout_seconds:
            raise RanksFailed(
                f"{self.kind} {self.ranks.rank} waited {self.timeout_seconds:g} s for {words}; start all of "
                "them, with one MASTER_ADDR and MASTER_PORT"
            )
        if is_told and now - self._told > AGAIN_SECONDS:
            self._told = now
            log.warning("waiting for %s (%.0f of %g s)", words, now - self._start, self.timeout_seconds)
        time.sleep(self._poll_seconds)
        self._poll_seconds = min(_POLLS_SECONDS[1], 1.3 * self._poll_seconds)


def _listed(missing: list[int], kind: Kind, most: int = 8) -> str:
    """Write "rank 3 has", "ranks 1, 2 have", or the first ones of many."""
    if len(missing) == 1:
        return f"{kind} {missing[0]} has"
    more = f" and {len(missing) - most} more" if len(missing) > most else ""
    return f"{kind}s {', '.join(map(str, missing[:most]))}{more} have"
