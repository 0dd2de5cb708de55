"""Packing: several samples behind each other in one row of a view, so that few positions are pads.

Only the view changes. What is asked of it keeps its order, by sample and position, and points elsewhere; all
that is keyed by sample (noise, masks, links, losses) never learns of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.segments import Segments
from tide_megatron.diffusion.views import View, view_of_parts


class Packs:
    """Rows that are filled first-fit: a sample goes into the first one that has room."""

    def __init__(self, length: int, block_size: int) -> None:
        """Start with no row.

        Args:
            length: positions of a row.
            block_size: samples begin at multiples of it; 1: anywhere.
        """
        self.length, self._block_size = length, block_size
        self.ends: list[int] = []
        """Of each row: where its last sample ends."""

    def place(self, tokens: int) -> tuple[int, int]:
        """Return (row, first position) of a sample that the next one will stand behind."""
        row, start = self.find(tokens)
        if row == len(self.ends):
            self.ends.append(0)
        self.ends[row] = start + tokens
        return row, start

    def find(self, tokens: int) -> tuple[int, int]:
        """Return where a sample would be placed; the row may be one that is not there yet."""
        for row, end in enumerate(self.ends):
            start = -(-end // self._block_size) * self._block_size
            if start + tokens <= self.length:
                return row, start
        return len(self.ends), 0


def packed(view: View, tokens: Sequence[int], length: int) -> View:
    """Put the samples of a view into as few rows as may be, on the host.

    Samples without real tokens, of which nothing can be asked, are left out.

    Args:
        view: one sample a row, on the CPU.
        tokens: real tokens of each of its rows, in one part.
        length: most positions of a part of a new row, at least as many as any sample has tokens.

    Returns:
        A view whose rows are as long as the fullest of them in whole blocks; `view` itself where no two
        samples have room in one row.
    """
    block_size = _block_size(view.context)
    places, packs = place_samples(tokens, length, block_size)
    if len(packs.ends) in (0, len(tokens)):
        return view
    own = min(length, -(-max(packs.ends) // block_size) * block_size)
    samples = torch.tensor(list(places))
    pack, start = (torch.tensor(numbers) for numbers in zip(*places.values(), strict=True))
    segments = Segments(pack=pack, start=start, tokens=torch.tensor(tokens)[samples])
    place = torch.arange(view.length)
    sample, at = (place < segments.tokens[:, None]).nonzero(as_tuple=True)  # [tokens of all samples] each
    parts = view.context.parts
    old = view.ids.view(len(view.ids), parts, view.length)
    ids = old.new_zeros(len(packs.ends), parts, own)
    ids[pack[sample], :, start[sample] + at] = old[samples[sample], :, at]
    to_pack, to_start = samples.new_zeros(2, len(tokens)).unbind()
    to_pack[samples], to_start[samples] = pack, start
    row, inside = view.rows // (parts * view.length), view.rows % (parts * view.length)
    part, position = inside // view.length, inside % view.length
    rows = (to_pack[row] * parts + part) * own + to_start[row] + position
    return view_of_parts(ids.flatten(1), view.context, segments, rows)


def _block_size(context: Context) -> int:
    """Return of what samples begin at a multiple: the predicate counts blocks from the start of a row."""
    return 1 if context.kind == "bidirectional" else context.block_size


def place_samples(
    tokens: Sequence[int], length: int, block_size: int
) -> tuple[dict[int, tuple[int, int]], Packs]:
    """Place samples longest first, or as they come where that takes fewer rows.

    So they never take more than whoever dealt them counted, one after the other.

    Args:
        tokens: of each sample; of one without any no place is given.
        length: positions of a row.
        block_size: samples begin at multiples of it.

    Returns:
        Sample -> (row, first position), in the samples' order; the rows.
    """
    given = [sample for sample, own in enumerate(tokens) if own]
    longest_first = sorted(given, key=lambda sample: -tokens[sample])
    found = [_filled(order, tokens, Packs(length, block_size)) for order in (longest_first, given)]
    places, packs = min(found, key=lambda one: len(one[1].ends))
    return dict(sorted(places.items())), packs


def _filled(
    order: Iterable[int], tokens: Sequence[int], packs: Packs
) -> tuple[dict[int, tuple[int, int]], Packs]:
    return {sample: packs.place(tokens[sample]) for sample in order}, packs
