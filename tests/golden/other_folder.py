"""A second folder in the goldens' format: other shapes, vocabularies, temperatures, block sizes and seeds.

Written in fp64 from the formulas of the spec over full tensors, with none of the package's code. It
shows that the replays take everything from the files: a constant of the first folder that slipped in
would fail here.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.golden.other_formulas import write_calm, write_masks, write_tidal
from tests.golden.other_sides import write_aligned_steps, write_cross_steps
from tests.golden.other_steps import write_plain_steps, write_shared_steps


def write_other_folder(folder: Path) -> None:
    """Write every file whose numbers come from formulas alone."""
    generator = torch.Generator().manual_seed(1234)
    write_masks(folder / "bd3lm_mask.npz")
    write_tidal(folder / "taid.npz", generator)
    write_calm(folder / "alm.npz", generator)
    write_plain_steps(folder / "step_bd3lm.npz", generator)
    write_shared_steps(folder / "step_shared.npz", generator)
    write_cross_steps(folder / "step_cross.npz", generator)
    write_aligned_steps(folder / "step_aligned.npz", generator)
