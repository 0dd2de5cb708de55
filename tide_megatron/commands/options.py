"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Wanted = Literal["auto", "cpu", "cuda"]
"""As `base.device.Wanted`, which would import torch here."""

ContextKind = Literal["bidirectional", "block_causal", "block_diffusion"]
"""As `diffusion.mask.ContextKind`, for the same reason."""

DeviceOption = Annotated[Wanted, typer.Option(help="Where to compute; auto takes CUDA where it works.")]
