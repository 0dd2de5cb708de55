"""Our launcher on several nodes: which node this is, and what the launchers tell each other.

One launcher a node starts that node's ranks. Node 0's holds the store at which all ranks meet, and in it
words that any launcher may leave for the others: that it was asked to stop, or why its node ended. So a
request that reached one node reaches the ranks of all, and after a failure the other nodes end in seconds
with its words, also where ranks would wait for a lost one until the timeout of a collective (NCCL).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import time
from typing import Literal

from torch.distributed import Store  # type: ignore[attr-defined]

from tide_megatron.base.device import Ranks, read_ranks
from tide_megatron.base.errors import ConfigError, RanksFailed, TideError
from tide_megatron.base.nodes import tasks_by_node
from tide_megatron.base.stop import Stopped
from tide_megatron.launch.rendezvous import meet

log = logging.getLogger(__name__)

LISTEN_SECONDS = 0.5
"""Between two looks for a word of another node."""
ANSWER_SECONDS = 30.0
"""So long may node 0's store take to answer before it is taken for lost."""
LEAVE_SECONDS = 10.0
"""So long does node 0, which holds the store, wait for the others at the end."""
_BY_HAND = ("NNODES", "NODE_RANK")
_STOP, _END, _LEFT = "stop", "end", "left"
Ending = Literal["halted", "fault", "failed"]
"""How a node ended: by a request, with nothing to save; by a fault of the user's (`TideError`); otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Word:
    """What a launcher tells the others."""

    kind: Ending | Literal["stop"]
    text: str
    node: int

    @property
    def error(self) -> TideError | RanksFailed | Stopped:
        """The end that it tells of, as the exception to raise."""
        if self.kind == "halted":
            return Stopped(f"stopped by {self.text} on node {self.node}")
        kind = TideError if self.kind == "fault" else RanksFailed
        return kind(f"node {self.node} failed first: {self.text}")


def read_node() -> Ranks | None:
    """Return this launcher's node as a place among the nodes; None: it is the only one.

    Under srun it is the task's, one task a node; else NNODES, NODE_RANK and MASTER_ADDR say it.

    Raises:
        ConfigError: several tasks stand on one node, torchrun started this process, or a variable is missing.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "--ranks-per-node is for our own launcher, but RANK or WORLD_SIZE says that this process is a "
            "rank already; leave it out under torchrun, else `unset RANK WORLD_SIZE`"
        )
    if any(os.environ.get(name) for name in _BY_HAND):
        return _by_hand()
    place = read_ranks()
    if place is None:
        return None
    tasks = tasks_by_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if place.local_rank or any(count > 1 for count in tasks):
        raise ConfigError(
            "--ranks-per-node starts the ranks of a node from one task, but srun started several tasks on "
            "one; give it --ntasks-per-node=1, or leave --ranks-per-node out where each task is to be a rank"
        )
    return place


def _by_hand() -> Ranks | None:
    given = {name: os.environ.get(name, "") for name in (*_BY_HAND, "MASTER_ADDR", "MASTER_PORT")}
    numbers = [int(given[name]) if given[name].isdecimal() else -1 for name in _BY_HAND]
    count, node = numbers
    port = int(given["MASTER_PORT"]) if given["MASTER_PORT"].isdecimal() else 0
    if count == 1 and node in (0, -1):
        return None
    if not (0 <= node < count and given["MASTER_ADDR"] and 0 < port < 2**16):
        said = " ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(
            f"{said} do not say which node this is; set NODE_RANK (from 0), and alike on all nodes NNODES, "
            "MASTER_ADDR (node 0's name) and MASTER_PORT, or `unset NNODES NODE_RANK` for one node"
        )
    return Ranks(rank=node, local_rank=0, world_size=count, address=given["MASTER_ADDR"], port=port)


class Nodes:
    """A launcher's line to those of the other nodes."""

    def __init__(self, place: Ranks, store: Store) -> None:
        """Use a store at which all launchers have met; `meet_nodes` does that."""
        self.place, self._store = place, store
        self._looked = 0.0
        self._words: dict[str, Word] = {}

    def tell_stop(self, signal_name: str) -> None:
        """Tell the others that this node was asked to stop."""
        self._tell(_STOP, "stop", signal_name)

    def tell_end(self, kind: Ending, text: str) -> None:
        """Tell the others why this node ends, unless one of them has said why already."""
        self._tell(_END, kind, text)

    def stop(self) -> Word | None:
        """Return another node's request, if there was one until the last look."""
        return self._of_others(_STOP)

    def end(self) -> Word | None:
        """Return the first end of a node, if it was another one's and known at the last look."""
        return self._of_others(_END)

    def look(self, *, at_once: bool = False) -> None:
        """Ask the store, at most every `LISTEN_SECONDS` unless it is to be at once."""
        now = time.monotonic()
        if not at_once and now - self._looked < LISTEN_SECONDS:
            return
        self._looked = now
        try:
            for key in {_STOP, _END} - set(self._words):
                if self._store.check([key]):
                    self._words[key] = Word(**json.loads(self._store.get(key)))
        except RuntimeError:
            lost = Word(kind="failed", text="its launcher has gone, and with it the store", node=0)
            self._words.setdefault(_END, lost)

    def _tell(self, key: str, kind: Ending | Literal["stop"], text: str) -> None:
        if key not in self._words:
            word = json.dumps({"kind": kind, "text": text, "node": self.place.rank})
            with contextlib.suppress(RuntimeError):  # who held the store has gone, and the others know
                self._words[key] = Word(**json.loads(self._store.compare_set(key, "", word)))

    def _of_others(self, key: str) -> Word | None:
        word = self._words.get(key)
        return None if word is None or word.node == self.place.rank else word

    def leave(self) -> None:
        """Say that this node has ended; node 0, which holds the store, waits a moment for all others."""
        with contextlib.suppress(RuntimeError):
            left = self._store.add(_LEFT, 1)
            end = time.monotonic() + LEAVE_SECONDS
            while self.place.rank == 0 and left < self.place.world_size and time.monotonic() < end:
                time.sleep(0.05)
                left = self._store.add(_LEFT, 0)


def meet_nodes(place: Ranks, timeout_seconds: float) -> Nodes:
    """Wait until the launchers of all nodes have come. Each of them calls it.

    Raises:
        ConfigError, RanksFailed: as `rendezvous.meet`, which says which node has not come.
    """
    store = meet(place, timeout_seconds, kind="node")
    store.set_timeout(datetime.timedelta(seconds=ANSWER_SECONDS))
    log.info("node %d of %d is up", place.rank, place.world_size)
    return Nodes(place, store)
