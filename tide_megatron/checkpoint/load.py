"""Loading: weights and optimizer state into a freshly built model, on any number of ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import tide_megatron.platform

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from tide_megatron.base.errors import CheckpointError, last_line
from tide_megatron.checkpoint.reading import restricted
from tide_megatron.checkpoint.sharded_state import loading_state, shards_to_load
from tide_megatron.checkpoint.stored import StoredTensors
from tide_megatron.parallel.collectives import fail_together


def load_checkpoint(found: Path, model: Any, optimizer: Any | None) -> None:
    """Load weights and optimizer state (None: only weights) into a freshly built student. Collective.

    Raises:
        CheckpointError: on every rank: tensors are missing or shaped for another model, or a file of it names
            something to run.
    """
    with contextlib.ExitStack() as stack:
        with fail_together():
            stack.enter_context(restricted(found))
        _load(found, model, optimizer)


def _load(found: Path, model: Any, optimizer: Any | None) -> None:
    """Load by the libraries, whose readers were replaced; sharded optimizer state straight to its place."""
    try:
        loaded = dist_checkpointing.load(loading_state(model, optimizer), str(found))
        model.load_state_dict(loaded["model"])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
    except (Exception, CheckpointException) as fault:
        # Whatever the libraries raise means: these bytes do not fit. torch's class is no Exception.
        raise CheckpointError(
            f"{found}: cannot be loaded ({last_line(fault)}); it is of another model, or a writer's fault: "
            "remove it to go on from an older one"
        ) from fault
    if optimizer is not None:
        with fail_together():
            StoredTensors(found).read_into(shards_to_load(model, optimizer))
