"""The files of a checkpoint in megatron-core's `torch_dist` format, written by torch's own writer.

The format is torch's (`torch.distributed.checkpoint`): shards as `torch.save` writes them, one behind the
other, and `.metadata` says which file has which shard from which byte on. megatron-core adds two small files:
the values that are no tensors of a model or optimizer (`common.pt`), and the format's name. Both its
supported lines read them. Nothing here is a collective: who plans together, and who waits for whom, is
`save.py`'s affair.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tide_megatron import __version__
from tide_megatron.base.errors import causes
from tide_megatron.base.files import DigestingFile, Digests

TABLE, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
"""Where each tensor lies; the values that are no shard; the format's name."""


class DigestingWriter(FileSystemWriter):
    """torch's writer for one folder, which flushes its files to the disk and knows their digests.

    `write_data` writes the shards of a plan, from any thread; `finish`, once for all plans, the table.
    """

    def __init__(self, folder: Path) -> None:
        """Write into an existing folder."""
        super().__init__(folder, per_thread_copy_ahead=0)
        self.digests: Digests = {}
        """Of the files written so far."""
        self.fs = _DigestingFiles(self.digests)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write a plan's shards.

        Raises:
            OSError: the disk refuses. torch's zip writer complains of its own unfinished file then, and hides
                why.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as fault:
            raise next((cause for cause in causes(fault) if isinstance(cause, OSError)), fault) from None


class _DigestingFiles(FileSystem):
    """Opens files whose digests are taken on the way."""

    def __init__(self, digests: Digests) -> None:
        self._digests = digests

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        """Open a file for `DigestingWriter`."""
        with Path(path).open(mode, buffering=0) as raw:
            stream = DigestingFile(raw)  # type: ignore[arg-type]  # opened for writing bytes
            yield stream  # type: ignore[misc]  # it has what the writer calls
        self._digests[Path(path).name] = stream.facts()


def write_common(folder: Path, common: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write what is no shard: megatron-core's two small files (one rank only).

    Args:
        folder: of the checkpoint.
        common: values that are the same on every rank.
        content: what the checkpoint says of its content, for whoever reads it.

    Raises:
        OSError: the disk refuses.
    """
    told = {"tide_megatron": __version__, "megatron_core": version("megatron-core"), **content}
    with (folder / COMMON).open("wb") as stream:
        torch.save({**common, "content_metadata": told}, stream)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
