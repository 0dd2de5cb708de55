"""The sharded state of model and optimizer, described once for saving and once for loading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tide_megatron.platform  # noqa: F401 - before megatron

import torch
from torch import Tensor

from tide_megatron.checkpoint.pieces import Piece, optimizer_rest, split_optimizer, split_weights

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The one optimizer format both supported megatron-core lines can load into any layout."""


def loading_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return what to load into a model and its optimizer. Collective."""
    metadata = _metadata(model)
    weights = model.sharded_state_dict(metadata=metadata)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata),
    }


class SavingState:
    """What there is to save; most of it is described once, for it stays where it is for a run's length."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        """Describe nothing yet: an optimizer may still be loaded, which moves its state."""
        self._model, self._optimizer = model, optimizer
        self._weights: dict[str, Any] | None = None
        self._rest: dict[str, Any] = {}
        self._pieces: list[Piece] = []

    def now(self) -> tuple[dict[str, Any], list[Piece]]:
        """Return what megatron-core saves, and the pieces that this rank writes.

        From the first call on weights and optimizer state must be changed in place only.
        """
        metadata = _metadata(self._model)
        if self._weights is None:
            self._weights = self._model.sharded_state_dict(metadata=metadata)
            state, pieces = split_optimizer(self._optimizer, self._weights, metadata)
            self._rest, own = split_weights(self._weights)
            self._pieces = [*own, *pieces]
        else:
            state = optimizer_rest(self._optimizer, self._weights, metadata)
        return {"model": dict(self._rest), "optimizer": state}, list(self._pieces)


def live_storages(model: Any, optimizer: Any) -> set[int]:
    """Return the addresses of all that training changes."""
    tensors = [*model.parameters(), *model.buffers(), *_optimizer_tensors(optimizer)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def optimizer_steps(optimizer: Any) -> list[int]:
    """Return the updates that the optimizer has counted, over this rank's parameters, each number once."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [part.optimizer for part in parts]
    states = [state for one in inner for state in getattr(one, "state", {}).values()]
    groups = [group for one in inner for group in getattr(one, "param_groups", [])]
    for counting in (states, groups):  # fused Adams count in groups; torch's leaves what it loaded there
        found = {int(counted["step"]) for counted in counting if "step" in counted}
        if found:
            return sorted(found)
    return []


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Yield masters and moments."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for group in getattr(inner, "param_groups", []):
            yield from group["params"]
        for state in getattr(inner, "state", {}).values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _metadata(model: Any) -> dict[str, Any]:
    """Return the metadata that saving and loading share."""
    return {**SHARDING, "dp_cp_group": model.groups.dp_cp}
