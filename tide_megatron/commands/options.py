"""Options that several verbs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

Wanted = Literal["auto", "cpu", "cuda"]
"""As `base.device.Wanted`, which would import torch here."""

ContextKind = Literal["bidirectional", "block_causal", "block_diffusion"]
"""As `diffusion.mask.ContextKind`, for the same reason."""

DeviceOption = Annotated[Wanted, typer.Option(help="Where to compute; auto takes CUDA where it works.")]

ContextOption = Annotated[
    ContextKind | None,
    typer.Option(help="The context kind that it was trained in; default: its folder's."),
]
BlockSizeOption = Annotated[
    int | None, typer.Option(min=1, help="The block size it was trained with; default: its folder's.")
]
RanksOption = Annotated[
    int | None, typer.Option(min=1, help="Ranks to start here; leave out under torchrun or srun.")
]


PrecisionOption = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(help="Numbers to compute in; auto: bf16 on CUDA, fp32 on CPU."),
]
EngineOption = Annotated[
    Literal["auto", "te", "scaled", "local", "emulated"],
    typer.Option(help="What computes the layers; one that is named runs or is refused (docs/precision.md)."),
]
Fp8Option = Annotated[
    Literal["rowwise", "blockwise", "tensorwise"] | None,
    typer.Option(help="Hold and multiply the layers' matrices in FP8, by this recipe."),
]


def print_whole(table: Table) -> None:
    """Print a table without cutting a name: a terminal folds them, a pipe has no edge."""
    import rich
    from rich.console import Console

    console = rich.get_console()
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", not console.is_terminal
    (console if console.is_terminal else Console(width=10_000)).print(table)
