"""Loading: weights and optimizer state into a freshly built model, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tide_megatron.platform

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from tide_megatron.base.errors import CheckpointError, last_line
from tide_megatron.checkpoint.sharded_state import loading_state


def load_checkpoint(found: Path, model: Any, optimizer: Any | None) -> None:
    """Load weights and optimizer state (None: only weights) into a freshly built student. Collective.

    Raises:
        CheckpointError: tensors are missing or shaped for another model.
    """
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
