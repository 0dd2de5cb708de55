"""What a Megatron checkpoint calls its norms: three programs write three spellings of the same tensors.

| written from | before attention | before a dense product | before a mixture |
|---|---|---|---|
| megatron-core's own layers, and ours | fused | fused | fused |
| Transformer Engine's layers | fused | fused | plain |
| layers without a map of names | plain | plain | plain |

Fused is the name inside the linear layer behind the norm (`mlp.linear_fc1.layer_norm_weight`), plain the
norm's own (`pre_mlp_layernorm.weight`). All other tensors have one name. What Transformer Engine keeps beside
weights (`_extra_state`) is neither read nor written for its layers: without FP8 histories it says nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Literal

from tide_megatron.base.errors import CheckpointError
from tide_megatron.convert.conversion import ShardedEntry
from tide_megatron.models.architecture import Architecture

Layers = Literal["local", "te"]
"""Whose layers a checkpoint is for."""
_PAIRS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
"""(fused, plain)."""


def as_stored(
    entries: Sequence[ShardedEntry], architecture: Architecture, names: Container[str], found: Path
) -> list[ShardedEntry]:
    """Return the entries under the names that a checkpoint has for them, whichever program wrote it.

    Args:
        entries: as megatron-core's own layers name them.
        architecture: of the model.
        names: of all tensors of the checkpoint.
        found: the checkpoint, for the message.

    Raises:
        CheckpointError: it mixes spellings, as no one program writes them.
    """
    ways: dict[str, dict[bool, str]] = {"dense": {}, "mixture": {}}
    for kind, fused, plain in _norms(entries, architecture):
        ways[kind] |= {is_plain: key for is_plain, key in ((False, fused), (True, plain)) if key in names}
    clashes = [ways["dense"], ways["mixture"]]
    if True in ways["dense"]:  # then nobody has a map of names
        clashes.append({True: ways["dense"][True], **ways["mixture"]})
    for clash in clashes:
        if len(clash) > 1:
            raise CheckpointError(
                f"{found}: mixes two spellings of its norms ({clash[False]} beside {clash[True]}), which no "
                "program writes; convert each of the checkpoints that it was put together from"
            )
    plains = {kind for kind, way in ways.items() if True in way}
    return [_renamed(entry, architecture, plains) for entry in entries]


def as_written(
    entries: Sequence[ShardedEntry], architecture: Architecture, layers: Layers
) -> list[ShardedEntry]:
    """Return the entries under the names that layers ask for.

    Args:
        entries: as megatron-core's own layers name them.
        architecture: of the model.
        layers: whose.
    """
    return [_renamed(entry, architecture, {"mixture"} if layers == "te" else set()) for entry in entries]


def _norms(entries: Sequence[ShardedEntry], architecture: Architecture) -> Iterator[tuple[str, str, str]]:
    """Yield (kind of what is behind it, fused name, plain name) of every norm that has two names."""
    for entry in entries:
        for fused, plain in _PAIRS:
            if fused in entry.entry.key:
                yield _kind(entry, architecture), entry.entry.key, entry.entry.key.replace(fused, plain)


def _renamed(entry: ShardedEntry, architecture: Architecture, plains: set[str]) -> ShardedEntry:
    """Return an entry, by its plain name where norms of its kind have that."""
    names = [plain for kind, _, plain in _norms([entry], architecture) if kind in plains]
    if not names:
        return entry
    return dataclasses.replace(entry, entry=dataclasses.replace(entry.entry, key=names[0]))


def _kind(entry: ShardedEntry, architecture: Architecture) -> str:
    """Say whether a norm stands before a mixture; one before attention counts as dense."""
    layer = entry.mapping.layer
    is_mixture = layer is not None and architecture.is_mixture(layer) and _PAIRS[1][0] in entry.entry.key
    return "mixture" if is_mixture else "dense"
