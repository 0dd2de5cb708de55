"""megatron-core's part of a save: whatever is not in pieces, and the table of contents.

Its asynchronous request is taken apart: it plans together at once, hands out what to write, and finishes
together later. Its own writers fork (0.16.1) the training process with all its threads, or copy nothing of
what a CPU run will change; so the writing is done here, in whatever thread calls `write`, over copies.
"""

from __future__ import annotations

import inspect
import queue
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tide_megatron.platform  # noqa: F401 - before megatron
from tide_megatron.platform.write_results import keep_results_here

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor

from tide_megatron.base.digests import Digests, digest_of

_KEYWORDS = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)
"""Newer versions would rather use another package's writers."""


class Request:
    """One planned save of megatron-core's."""

    def __init__(
        self, state: dict[str, Any], partial: Path, metadata: Mapping[str, Any], *, is_checked: bool
    ) -> None:
        """Plan and collect what this rank writes; small common values are written at once. Collective.

        Args:
            state: sharded state of this rank.
            partial: the folder to write in.
            metadata: how the state is sharded, for whoever reads it.
            is_checked: compare with all ranks that every tensor is written once and common values agree.
        """
        self._results = keep_results_here()
        request = dist_checkpointing.save(
            state,
            str(partial),
            async_sharded_save=True,
            validate_access_integrity=is_checked,
            content_metadata=dict(metadata),
            **_KEYWORDS,
        )
        assert request is not None, "an asynchronous save answers with a request"
        self._finish = request.finalize_fns
        self._transforms: list[Any] = []
        self._buckets: list[Any] = []
        if request.async_fn is not None:
            self._transforms = request.async_fn.args[0]
            self._buckets = request.preload_fn()  # on CUDA: copied to the host here

    def copy(self, live: Collection[int]) -> None:
        """Copy the tensors that training will change, given the addresses of their storages."""
        self._buckets = [
            (path, key, (values, [(item, _copied(tensor, live)) for item, tensor in tensors]))
            for path, key, (values, tensors) in self._buckets
        ]

    def write(self) -> Digests:
        """Write this rank's files and flush them; from any thread. Returns their digests.

        Raises:
            OSError: the disk refuses.
        """
        answers: dict[int, Any] = {}
        digests = {}
        for number, bucket in enumerate(self._buckets):
            results: queue.Queue[Any] = queue.Queue()
            working: queue.Queue[int] = queue.Queue()
            working.put(number)  # megatron-core's writer takes it out when it is done
            FileSystemWriterAsync.write_preloaded_data(
                self._transforms, number, bucket, results, working, use_fsync=True
            )
            answer = results.get_nowait()[1]
            if isinstance(answer, Exception):
                raise answer
            answers[number] = answer
            digests[bucket[1]] = digest_of(Path(bucket[0]))
        if self._buckets:
            self._results.put(answers)
        self._buckets = []
        return digests

    def finish(self) -> None:
        """Write the table of contents together. Collective, after `write` on all ranks."""
        for step in self._finish:
            step()


def _copied(tensor: Tensor, live: Collection[int]) -> Tensor:
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor
