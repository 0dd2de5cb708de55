"""Where ranks meet: a store at rank 0's address, and words about who has not come.

torch's own rendezvous waits in one library call, says nothing, and at the end names no rank. Here every rank
enters its number into the store and waits in Python, so that a signal is heard, a port that is taken or an
address that nobody answers is named as such, and rank 0 tells after two seconds whom it waits for.

torch's store listens at all addresses of its machine and asks nobody who he is. Ours listens at the job's own
address alone. A secret in the names of its entries would keep nobody out who reaches it: any guest may ask
torch's store for all names.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import socket
import time
from collections.abc import Sequence
from typing import Literal

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from tide_megatron.base.device import Ranks, is_loopback, node_share
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
_BACKLOG = 1024
_EVERYWHERE = (
    "MASTER_ADDR: %s leads to %s here, which is no address of this machine that others can reach, so port %d "
    "is open at all of its addresses; name the one by which the nodes reach each other"
)
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", _RESTARTS)
Kind = Literal["rank", "node"]
"""Who meets: ranks, or the launchers of several nodes before they start theirs."""


def own_store() -> TCPStore:
    """Open a store for ranks of this machine alone, which no other machine can reach."""
    server = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
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
    server = _listen(ranks, wait) if is_host else None
    try:
        return TCPStore(
            ranks.address,
            ranks.port,
            ranks.world_size,
            is_master=is_host,
            timeout=datetime.timedelta(seconds=min(ANSWER_SECONDS, wait.timeout_seconds)),
            wait_for_workers=False,
            master_listen_fd=None if server is None else server.detach(),
        )
    except RuntimeError as error:
        raise _cannot_meet(ranks, wait, error) from error


def _listen(ranks: Ranks, wait: _Wait) -> socket.socket:
    """Listen where the ranks are to meet, or at all addresses and say so, if others may not reach that."""
    try:
        found = socket.getaddrinfo(ranks.address, ranks.port, type=socket.SOCK_STREAM)
        addresses = [(family, str(place[0])) for family, *_, place in found]
        for family, host in addresses if _is_for_all(ranks, wait.kind, addresses) else ():
            with contextlib.suppress(OSError):
                return _server(family, host, ranks.port)
        log.warning(_EVERYWHERE, ranks.address, addresses[0][1], ranks.port)
        has_both = socket.has_dualstack_ipv6()
        return _server(socket.AF_INET6 if has_both else socket.AF_INET, "", ranks.port)
    except socket.gaierror as fault:
        raise _cannot_meet(ranks, wait, fault) from fault


def _server(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """Listen at one address; empty: at all of this machine.

    Raises:
        ConfigError: the port is taken, or may not be listened at.
        OSError: this machine has no such address.
    """
    is_both = not host and family == socket.AF_INET6
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=is_both)
    except OSError as fault:
        if fault.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of this machine is taken by another program or run, so the ranks cannot "
                "meet there; put MASTER_PORT= and a free one before the command (torchrun: --master-port)"
            ) from None
        if fault.errno == errno.EACCES:
            raise ConfigError(
                f"MASTER_PORT={port}: this port may not be listened at here; choose one above 1023"
            ) from None
        raise


def _cannot_meet(ranks: Ranks, wait: _Wait, fault: Exception) -> RanksFailed:
    return RanksFailed(
        f"rank {ranks.rank} of {ranks.world_size} cannot meet the others at {wait.where}: {fault}"
    )


def _is_for_all(ranks: Ranks, kind: Kind, addresses: Sequence[tuple[socket.AddressFamily, str]]) -> bool:
    """Say whether others may reach what a name leads to here: Debian leads a machine's own to 127.0.1.1."""
    on_one_machine = kind == "rank" and node_share()[1] == ranks.world_size
    return is_loopback(ranks.address) or on_one_machine or not all(is_loopback(host) for _, host in addresses)


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
