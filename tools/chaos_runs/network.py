"""Two hosts on this machine: network namespaces with a switch between them, whose cables can be pulled.

Needs root and iproute2. Nothing of the machine's own network is touched. Processes enter a host with
`nsenter --net`: they keep this machine's files and process numbers, and lose its network.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from chaos_runs.apart import NAMESPACES

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "tide0"
"""Each host's own name for its cable."""
_OWN = "tide"
"""Begins the names of our hosts, before the number of the process that makes them."""
_numbers = itertools.count()
Cut = Literal["link", "switch"]
"""The cable is pulled, and both ends know; or the switch no longer passes anything on, and nobody does."""


def why_not() -> str | None:
    """Return why there can be no hosts here; None where there can."""
    missing = [name for name in ("ip", "nsenter") if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not here (Debian: iproute2, util-linux)"
    return None if os.geteuid() == 0 else "network namespaces need root"


class Hosts:
    """Two hosts and a switch; a context manager that takes them away again."""

    def __init__(self) -> None:
        """Give them names that nobody has."""
        own = f"{_OWN}-{os.getpid()}-{next(_numbers)}"
        self._names = [f"{own}-{node}" for node in range(2)]
        self._switch = f"{own}-switch"

    def __enter__(self) -> Hosts:
        """Make them, and take away what a process left that was killed."""
        for left in NAMESPACES.glob(f"{_OWN}-*"):
            owner = left.name.split("-")[1]
            if not Path("/proc", owner).exists():
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip("netns", "delete", left.name)
        try:
            for name in (*self._names, self._switch):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for node, (name, address) in enumerate(zip(self._names, ADDRESSES, strict=True)):
                there = ("peer", "name", INTERFACE, "netns", name)
                _ip("-n", self._switch, "link", "add", f"port{node}", "type", "veth", *there)
                _ip("-n", self._switch, "link", "set", f"port{node}", "master", "bridge", "up")
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Take them away."""
        for name in (*self._names, self._switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)

    def entering(self, node: int) -> list[str]:
        """Return the words that start a command on a host."""
        return ["nsenter", f"--net={NAMESPACES / self._names[node]}"]

    def cut(self, node: int, how: Cut) -> None:
        """Part a host from the other one."""
        last = ("down",) if how == "link" else ("nomaster",)
        _ip("-n", self._switch, "link", "set", f"port{node}", *last)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
