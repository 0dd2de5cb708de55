"""Where megatron-core's checkpoint writers leave their results: in this process.

megatron-core starts a server process for a queue that forked writers could share, at the first save, and
never ends it. Ours write in threads of this process, for which a plain queue will do.
"""

from __future__ import annotations

import queue
from typing import Any


def keep_results_here() -> queue.Queue[Any]:
    """Let the next save of megatron-core's use a new queue of this process, and return the queue."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results: queue.Queue[Any] = queue.Queue()
    filesystem_async._results_queue = results
    return results
