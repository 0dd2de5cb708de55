"""Our launcher on several nodes: which node this is, and what the launchers tell each other.

One launcher a node starts that node's ranks. Node 0's holds the store at which all ranks meet, and in it
words that any launcher may leave for the others: that it was asked to stop, or why its node ended. So a
request that reached one node reaches the ranks of all, and after a failure the other nodes end in seconds
with its words, also where ranks would wait for a lost one until the timeout of a collective (NCCL).

A node that is lost leaves no words, and a network that is cut does not even close connections. So every
launcher leaves signs of life, twice a second; node 0 misses those of the others, and the others node 0's
answers. All of that is a thread's, for an answer may never come.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from torch.distributed import Store  # type: ignore[attr-defined]

from tide_megatron.base.device import Ranks, read_ranks
from tide_megatron.base.errors import ConfigError, RanksFailed, RanksLost, TideError
from tide_megatron.base.nodes import tasks_by_node
from tide_megatron.base.stop import Stopped
from tide_megatron.launch.lost_hosts import own_host
from tide_megatron.launch.rendezvous import meet

log = logging.getLogger(__name__)

LISTEN_SECONDS = 0.5
"""Between two looks for a word of another node, and between two signs of life."""
SILENCE_SECONDS = 30.0
"""So long may a node give no sign before it is taken for lost."""
PEERS_SECONDS = 2.0
"""Where ranks here have lost theirs: so long may a node give no sign before it is taken for the cause."""
LEAVE_SECONDS = 10.0
"""So long does node 0, which holds the store, wait for the others at the end."""
_BY_HAND = ("NNODES", "NODE_RANK")
_STOP, _END, _LEFT = "stop", "end", "left"
_HAS_LEFT = -(2**60)
"""Added to the signs of a node that has ended in order."""
_AT_ONCE_SECONDS = 1.0
Ending = Literal["halted", "fault", "lost", "failed"]
"""How a node ended: by a request, with nothing to save; by a fault of the user's (`TideError`); by the loss
of a rank or of the whole node; otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Word:
    """What a launcher tells the others."""

    kind: Ending | Literal["stop"]
    text: str
    node: int
    host: str = ""
    """Where a rank was lost."""

    @property
    def error(self) -> TideError | RanksFailed | Stopped:
        """The end that it tells of, as the exception to raise."""
        if self.kind == "halted":
            return Stopped(f"stopped by {self.text} on node {self.node}")
        text = f"node {self.node} failed first: {self.text}"
        if self.kind == "lost":
            return RanksLost(text, self.host)
        return TideError(text) if self.kind == "fault" else RanksFailed(text)


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

    def __init__(
        self,
        place: Ranks,
        store: Store,
        silence_seconds: float = SILENCE_SECONDS,
        hosts: Sequence[str] = (),
    ) -> None:
        """Use a store at which all launchers have met; `meet_nodes` does that.

        Args:
            place: this node's among the nodes.
            store: node 0's.
            silence_seconds: so long may a node give no sign before it is taken for lost.
            hosts: of the nodes; none: they are not known.
        """
        self.place, self._store, self._silence_seconds = place, store, silence_seconds
        self._hosts = dict(enumerate(hosts))
        self._looked = 0.0
        self._words: dict[str, Word] = {}
        self._signs = dict.fromkeys(set(range(place.world_size)) - {place.rank}, 0)
        """Of each other node, how many it has given; node 0 alone reads them."""
        self._heard = dict.fromkeys(self._signs, time.monotonic())
        """When there was a new one, at the last look."""
        self._asked_at: float | None = None
        """Since when the thread has been waiting for the store."""
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._keep_line, name="nodes", daemon=True).start()

    def tell_stop(self, signal_name: str) -> None:
        """Tell the others that this node was asked to stop."""
        self._tell(_STOP, self._word("stop", signal_name, self.place.rank))

    def tell_end(self, kind: Ending, text: str) -> None:
        """Tell the others why this node ends, unless one of them has said why already."""
        self._tell(_END, self._word(kind, text, self.place.rank))

    def stop(self) -> Word | None:
        """Return another node's request, if there was one until the last look."""
        return self._of_others(_STOP)

    def end(self) -> Word | None:
        """Return the first end of a node, if it was another one's and known at the last look."""
        return self._of_others(_END)

    def look(self, *, at_once: bool = False) -> None:
        """Take in what is known, at most every `LISTEN_SECONDS` unless the store is to be asked at once."""
        now = time.monotonic()
        if not at_once and now - self._looked < LISTEN_SECONDS:
            return
        self._looked = now
        self._do(self._ask, _AT_ONCE_SECONDS if at_once else LISTEN_SECONDS)
        self._miss(self._silence_seconds)

    def miss_peers(self) -> None:
        """Take a node for lost that gives no sign just now, where ranks here have lost their peers."""
        self._miss(PEERS_SECONDS)

    def leave(self) -> None:
        """Say that this node has ended; node 0, which holds the store, waits a moment for all others."""
        end = time.monotonic() + LEAVE_SECONDS

        def say() -> None:
            self._store.add(_sign_of(self.place.rank), _HAS_LEFT)
            left = self._store.add(_LEFT, 1)
            while self.place.rank == 0 and left < self.place.world_size and time.monotonic() < end:
                time.sleep(0.05)
                left = self._store.add(_LEFT, 0)

        is_alone = self.end() is not None and self._words[_END].kind == "lost" and self.place.world_size == 2
        if not is_alone:
            self._do(say, LEAVE_SECONDS)
        self._tasks.put(None)

    def _word(self, kind: Ending | Literal["stop"], text: str, node: int) -> Word:
        return Word(kind=kind, text=text, node=node, host=self._hosts.get(node, ""))

    def _tell(self, key: str, word: Word) -> None:
        """Leave a word, unless there is one."""

        def say() -> None:
            said = self._store.compare_set(key, "", json.dumps(dataclasses.asdict(word)))
            self._words[key] = Word(**json.loads(said))

        if key not in self._words:
            self._do(say, _AT_ONCE_SECONDS)

    def _of_others(self, key: str) -> Word | None:
        word = self._words.get(key)
        return None if word is None or word.node == self.place.rank else word

    def _miss(self, silence_seconds: float) -> None:
        """Take a node for lost that has given no sign for so long."""
        now, since = time.monotonic(), dict(self._heard)
        if self.place.rank:  # only node 0 is known to others, by its answers
            since = {} if self._asked_at is None else {0: self._asked_at}
        node = min(since, key=since.__getitem__, default=None)
        if node is None or now - since[node] < silence_seconds or _END in self._words:
            return
        text = f"no sign of life for {now - since[node]:.0f} s: its machine or its network is down"
        word = self._word("lost", text, node)
        self._tell(_END, word)
        self._words.setdefault(_END, word)

    def _do(self, task: Callable[[], None], seconds: float) -> None:
        """Have the thread do something; wait for it so long at most."""
        is_done = threading.Event()
        self._tasks.put((task, is_done))
        is_done.wait(seconds)

    def _keep_line(self) -> None:
        """Do what is asked for, and give signs of life; a thread's work until the node leaves."""
        while True:
            try:
                task = self._tasks.get(timeout=LISTEN_SECONDS)
            except queue.Empty:
                task = (self._ask, threading.Event())
            if task is None:
                return
            self._asked_at = time.monotonic()
            try:
                task[0]()
            except RuntimeError:
                gone = "its launcher has gone, and with it the store"
                self._words.setdefault(_END, self._word("lost", gone, 0))
            self._asked_at = None
            task[1].set()

    def _ask(self) -> None:
        """Give a sign of life, and take in what the others have left."""
        self._store.add(_sign_of(self.place.rank), 1)
        for key in {_STOP, _END} - set(self._words):
            if self._store.check([key]):
                self._words[key] = Word(**json.loads(self._store.get(key)))
        for node, known in self._signs.items() if self.place.rank == 0 else ():
            signs = self._store.add(_sign_of(node), 0)
            if signs != known or signs < 0:
                self._signs[node], self._heard[node] = signs, time.monotonic()


def _sign_of(node: int) -> str:
    return f"alive/{node}"


def meet_nodes(place: Ranks, timeout_seconds: float, hang_seconds: float | None = None) -> Nodes:
    """Wait until the launchers of all nodes have come. Each of them calls it.

    Args:
        place: this node's among the nodes.
        timeout_seconds: how long to wait for one that never comes.
        hang_seconds: how long a rank may stand still; a node that is lost is noticed before ranks that wait
            for it are taken for the cause.

    Raises:
        ConfigError, RanksFailed: as `rendezvous.meet`, which says which node has not come.
    """
    store = meet(place, timeout_seconds, kind="node")
    store.set_timeout(datetime.timedelta(seconds=SILENCE_SECONDS))
    log.info("node %d of %d is up", place.rank, place.world_size)
    store.set(f"host/{place.rank}", own_host())
    hosts = [store.get(f"host/{node}").decode() for node in range(place.world_size)]
    return Nodes(place, store, min(SILENCE_SECONDS, (hang_seconds or math.inf) / 2), hosts)
