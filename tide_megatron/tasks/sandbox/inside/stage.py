"""Confine this process as told, and hold a session in it.

The kinds of `Isolation`:

- `namespaces`: takes its own namespaces, starts a first process in them, which starts the one that runs
  programs; when that ends, the kernel kills all that is left there. This process waits, and says with its
  exit code how it ended, 128 more than a signal's number for one.
- `bubblewrap`: is in the namespaces that bubblewrap made; a filter refuses all writing, since bubblewrap
  bounds no number of files.
- `filters`: has no namespaces; Landlock where the kernel has it, and a filter that refuses all writing.
- `none`: limits of resources alone.

Standard input and output are the two pipes of the session; before a program runs they lead nowhere. A fault
in confining is one line on standard error and exit code 70: no program has run.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tide_megatron.tasks.sandbox.inside import confine, namespaces, system_calls
from tide_megatron.tasks.sandbox.inside.session import Session

FAULT = 70
"""Exit code of a process that could not be confined."""


def main(told: dict[str, Any]) -> None:
    """Confine and serve; ends the process."""
    try:
        confine.die_with_parent()
        if told["kind"] == "namespaces":
            _in_namespaces(told)
        if told["kind"] == "filters" and confine.landlock_version():
            confine.see_only(told["readable"])
        _serve(told)
    except (OSError, system_calls.NoFilter) as fault:
        sys.stderr.write(f"{fault}\n")
        sys.stderr.flush()
        os._exit(FAULT)


def _in_namespaces(told: dict[str, Any]) -> None:
    """Go on in the second process of new namespaces; the others wait and end as it does."""
    was_root = namespaces.leave()
    _go_on_in_child()
    namespaces.enter_root(told["shown"], told["covered"], told["work_bytes"], told["work_files"])
    confine.hide_memory()
    _go_on_in_child()
    if was_root:
        confine.become_nobody()


def _go_on_in_child() -> None:
    """Return in a new process; this one waits, and ends as that one."""
    child = os.fork()
    if not child:
        confine.die_with_parent()
        return
    for number in (0, 1):
        os.close(number)  # whoever reads must see that the child is gone
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    status = os.waitpid(child, 0)[1]
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _serve(told: dict[str, Any]) -> None:
    """Give up the rest, and answer."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    if told["kind"] != "none":
        confine.drop_privileges()
    confine.limit(told)
    if told["is_filtered"]:
        system_calls.forbid(writing=told["kind"] != "namespaces")
    for number in (0, 1, 2):
        os.dup2(told["nowhere"], number)
    Session(requests, answers, told["output_characters"]).serve()
    os._exit(0)
