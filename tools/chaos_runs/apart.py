"""What a tool plants goes with it, however it ends: its mounts, the names of its networks, its launchers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_IS_APART = "TIDE_CHAOS_IS_APART"
NAMESPACES = Path("/run/netns")
"""Where the names of networks stand, each a mount."""


def own_mounts() -> None:
    """Start this command over in a mount namespace of its own, which ends with its last process.

    Nothing happens without root, where nothing is mounted. The process keeps its number.
    """
    if os.geteuid() or not shutil.which("unshare"):
        return
    if _IS_APART not in os.environ:
        os.environ[_IS_APART] = "1"
        own = ["unshare", "--mount", "--propagation", "private", "--", sys.executable, *sys.argv]
        os.execvp(own[0], own)
    NAMESPACES.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", NAMESPACES], check=True)


def dying_with_this() -> list[str]:
    """Return the words that start a command which is killed when the thread that starts it has ended."""
    return ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
