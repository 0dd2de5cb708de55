"""What a model reads: a `View` of a noised batch, for the student and for every teacher alike.

Three context kinds (design section 4): `bidirectional` (one noised sequence, everybody sees everybody),
`block_causal` (one noised sequence, a block sees itself and the blocks before it), `block_diffusion`
([x_t ; x_0]: noised half then clean half, spec section 1). Complementary views (CompDemo) will be further
functions here that return the same type.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.mask import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """One model's input for one microbatch."""

    ids: Tensor
    """[samples, parts * length] int64."""
    positions: Tensor
    """[samples, parts * length] int64: 0..length-1 in each part."""
    context: Context
    length: int
    """Length of one part."""
    lengths: Tensor | None
    """[samples] int64 real tokens of each part where pads must not be seen; None: pads are ordinary."""
    rows: Tensor
    """[rows] int64: flat indices into [samples * parts * length] of the positions to predict."""


def plain_view(noised: Noised, context: Context, mask_id: int, lengths: Tensor | None = None) -> View:
    """Build the view in which every hidden token is shown as `mask_id`.

    Args:
        noised: the microbatch, [samples, length].
        context: the model's context kind and block size.
        mask_id: the mask token of THIS model (teacher and student may differ).
        lengths: [samples] real tokens where padding must not be attended to (teachers of the reference).
    """
    samples, length = noised.hidden.shape
    noisy = noised.batch.ids.masked_fill(noised.hidden, mask_id)
    parts = [noisy, noised.batch.ids] if context.parts == 2 else [noisy]
    ids = torch.cat(parts, dim=1)  # [samples, parts * length]
    positions = torch.arange(length, device=ids.device).repeat(context.parts).expand(samples, -1)
    sample, position = noised.row_index
    rows = sample * ids.shape[1] + position  # the noised part comes first in every context
    return View(ids=ids, positions=positions, context=context, length=length, lengths=lengths, rows=rows)


def trimmed_view(noised: Noised, context: Context, mask_id: int) -> View:
    """Build the plain view that does not depend on how far the batch was padded.

    Under block contexts right-hand pads change nothing before them, so they stay ordinary tokens, as in the
    reference. A bidirectional model would see them, and so depend on its neighbours: they are hidden from it.
    """
    lengths = noised.batch.lengths if context.kind == "bidirectional" else None
    return plain_view(noised, context, mask_id, lengths)
