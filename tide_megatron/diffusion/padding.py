"""Padding of one example: up to a whole block with end-of-text tokens, then up to a fixed length with pads.

The two differ in what the model learns. End-of-text tokens that fill the last block are targets like any
other (that is how a block-diffusion model learns to stop inside a block); pads are never masked (spec
section 1 item 10). The order is fixed: blocks first, then the fixed length. Plain lists, because this
runs at load time.
"""

from __future__ import annotations

from collections.abc import Sequence

from tide_megatron.base.errors import DataError
from tide_megatron.diffusion.batch import IGNORED


def pad_to_blocks(
    ids: Sequence[int], labels: Sequence[int], block_size: int, eos_id: int
) -> tuple[list[int], list[int]]:
    """Extend an example to the next multiple of `block_size` with `eos_id`, in ids and labels alike.

    An exact multiple gets nothing. Returns new (ids, labels).
    """
    assert len(ids) == len(labels), f"{len(ids)} ids but {len(labels)} labels"
    filling = [eos_id] * (-len(ids) % block_size)
    return [*ids, *filling], [*labels, *filling]


def pad_to_length(
    ids: Sequence[int], labels: Sequence[int], length: int, pad_id: int
) -> tuple[list[int], list[int]]:
    """Extend an example to `length` tokens with `pad_id`, labelled IGNORED. Returns new (ids, labels).

    Raises:
        DataError: the example is longer than `length`.
    """
    assert len(ids) == len(labels), f"{len(ids)} ids but {len(labels)} labels"
    missing = length - len(ids)
    if missing < 0:
        raise DataError(
            f"an example of {len(ids)} tokens (blocks filled up) exceeds the fixed length of {length}; "
            "raise the length or prepare shorter records"
        )
    return [*ids, *[pad_id] * missing], [*labels, *[IGNORED] * missing]
