"""Whether the values of a folder's weights can be those of the model that its config.json describes.

Names and shapes may fit although the bytes are wrong: holes of an interrupted download read as zeros, a head
that is not the embedding although config.json ties them, a mask token whose row was never trained. What would
make another model is refused; what is odd, yet may be meant, is a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from tide_megatron.base.errors import CheckpointError, some_of
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.mapping import ParamMapping
from tide_megatron.models.shard import Part
from tide_megatron.parallel.collectives import is_first

log = logging.getLogger(__name__)

_ROWS = 4096  # read at a time
_SAMPLED_ROWS = 256  # of the embedding, for the length that a row usually has
_NEAR_ZERO = 0.1  # of that length


class ZeroWatch:
    """Reads tensors and remembers those that are all zeros, where a trained model has none."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """Begin with the names of tensors that are known to be so."""
        self.names = list(names)

    def read(self, source: HfFolder, mapping: ParamMapping) -> list[Tensor]:
        """Return this rank's parts of the tensors that a mapping joins."""
        tensors = []
        for name in mapping.sources:
            part = mapping.part(name)
            tensor = source.read(name, part)
            is_padding = part is not None and all(start == stop for start, stop in part.ranges)
            if mapping.fill != 0 and not is_padding and _is_zero(tensor):
                self.names.append(name)
            tensors.append(tensor)
        return tensors


def _is_zero(tensor: Tensor) -> bool:
    """Say whether every bit of a tensor is zero; the first row nearly always answers it."""
    if not tensor.numel():
        return False
    first = tensor[:1].contiguous().view(torch.uint8)
    return not first.any() and not tensor.contiguous().view(torch.uint8).any()


def refuse_other_head(architecture: Architecture, source: HfFolder, share: tuple[int, int]) -> None:
    """Refuse a folder whose output head differs from the embedding that it is tied to.

    Args:
        architecture: of the model.
        source: its folder.
        share: (this rank, ranks); they share the rows out.

    Raises:
        CheckpointError: it differs in this rank's rows.
    """
    head, table = architecture.head_name, architecture.embedding_name
    if not architecture.tied or head not in source.shapes:
        return
    shape = source.shapes[table]
    is_same = source.shapes[head] == shape
    rank, ranks = share
    for start in range(rank * _ROWS, shape[0] if is_same else 0, ranks * _ROWS):
        rows = Part(ranges=((start, min(start + _ROWS, shape[0])),))
        one, other = source.peek(head, rows), source.peek(table, rows)
        is_same = is_same and torch.equal(one.float(), other.float())
    if not is_same:
        key = architecture.keys.get("tie_word_embeddings", "tie_word_embeddings")
        raise CheckpointError(
            f"{source.folder}: config.json: {key}: True, but {head} differs from {table}; set {key} to "
            "false if the model was trained with a head of its own, else save it again without one"
        )


def warn_of_doubts(
    architecture: Architecture, source: HfFolder, zeros: ZeroWatch, mask_id: int | None = None
) -> None:
    """Log what is odd about a folder and no fault.

    Args:
        architecture: of the model.
        source: its folder.
        zeros: what read its tensors on this rank.
        mask_id: id of the mask token; None: what config.json says, if it does.
    """
    if zeros.names:
        log.warning(
            "%s: %d tensors are all zeros: %s; if the model was not made so, its download broke off: fetch "
            "it again",
            source.folder,
            len(zeros.names),
            some_of(zeros.names),
        )
    if not is_first():  # the others would say the same
        return
    for doubt in source.doubts:
        log.warning("%s", doubt)
    _warn_of_mask_row(architecture, source, mask_id)
    _warn_of_frequencies(architecture, source)


def _warn_of_mask_row(architecture: Architecture, source: HfFolder, mask_id: int | None) -> None:
    """Warn of a mask token whose embedding is near zero: nobody trained the model with it."""
    told = architecture.source.get("mask_token_id")
    mask = told if mask_id is None else mask_id
    table = architecture.embedding_name
    rows = architecture.vocabulary
    if not isinstance(mask, int) or not 0 <= mask < rows:
        return
    step = max(1, rows // _SAMPLED_ROWS)
    sampled = Part(ranges=tuple((row, row + 1) for row in range(0, rows, step)))
    usual = float(source.peek(table, sampled).float().norm(dim=1).median())
    own = float(source.peek(table, Part(ranges=((mask, mask + 1),))).float().norm())
    if own < _NEAR_ZERO * usual:
        log.warning(
            "%s: the embedding of the mask token (id %d) has length %.2g, other rows %.2g: the model was not "
            "trained with it, and first losses will be far above those of a model that was",
            source.folder,
            mask,
            own,
            usual,
        )


def _warn_of_frequencies(architecture: Architecture, source: HfFolder) -> None:
    """Warn of rotary frequencies in a file that are not those config.json asks for; they are not used."""
    dims = torch.arange(0, architecture.rotary_dim, 2, dtype=torch.float32) / architecture.rotary_dim
    wanted = architecture.rotary_base**-dims
    names = [name for name in source.shapes if name.endswith("rotary_emb.inv_freq")]
    other = [name for name in names if not _are_near(source.peek(name), wanted)]
    if other:
        log.warning(
            "%s: rotary frequencies in the file are not those that config.json asks for: %s; the model may "
            "have been trained with other rope_theta or scaling than config.json says",
            source.folder,
            some_of(other),
        )


def _are_near(found: Tensor, wanted: Tensor) -> bool:
    """Compare frequencies that may have been rounded to bf16."""
    return found.shape == wanted.shape and torch.allclose(found.float(), wanted, rtol=1e-2, atol=0.0)
