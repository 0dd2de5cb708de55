"""`tide convert`: between Hugging Face folders and Megatron checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import torch


app = typer.Typer(help="Convert weights between Hugging Face and Megatron.", no_args_is_help=True)

Ranks = Annotated[
    int | None, typer.Option(min=1, help="Processes to share the work; leave out under torchrun or srun.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands at TARGET.")]
Dtype = Annotated[
    Literal["stored", "bf16", "fp32"],
    typer.Option(help="Dtype of the weights; a router bias stays as stored."),
]


@app.command("hf-to-megatron")
def hf_to_megatron(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder of safetensors.")],
    target: Annotated[Path, typer.Argument(help="Megatron checkpoint folder to make.")],
    ranks: Ranks = None,
    dtype: Dtype = "stored",
    layers: Annotated[
        Literal["local", "te"],
        typer.Option(help="Whose names norms have: megatron-core's own layers', or Transformer Engine's."),
    ] = "local",
    force: Force = False,
) -> None:
    """Write a Megatron checkpoint (torch_dist), which any layout of any Megatron tool can load.

    Transformer Engine's layers name the norm before a mixture of experts in their own way; of dense models
    both find every weight. Back again both spellings are read.

    Nothing appears at TARGET before it is whole. A conversion that was cut off goes on when the same command
    is given again.

    Example: tide convert hf-to-megatron models/wedlm checkpoints/wedlm --ranks 4
    """
    import rich

    from tide_megatron.base.files import local_path
    from tide_megatron.convert.hf_to_megatron import hf_to_megatron as convert
    from tide_megatron.launch.ranks import run_ranks

    found = run_ranks(
        convert, (local_path(source), local_path(target), _torch(dtype), force, layers), ranks, "cpu"
    )
    rich.print(
        f"{target}: {found['tensors']} tensors, {found['elements']:,} numbers, {found['seconds']:.1f} s"
    )


@app.command("megatron-to-hf")
def megatron_to_hf(
    source: Annotated[Path, typer.Argument(help="Megatron checkpoint (torch_dist), or a run's checkpoints.")],
    target: Annotated[Path, typer.Argument(help="Hugging Face folder to make.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder of the same model, for config.json and tokenizer; SOURCE/hf."),
    ] = None,
    ranks: Ranks = None,
    dtype: Dtype = "stored",
    shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    shard_gb: Annotated[float | None, typer.Option(min=0.0, hidden=True)] = None,
    force: Force = False,
) -> None:
    """Write safetensors from a Megatron checkpoint, whatever layout wrote it.

    A conversion that was cut off goes on when the same command is given again.

    Example: tide convert megatron-to-hf checkpoints/wedlm models/wedlm-again --ranks 4
    """
    import rich

    from tide_megatron.base.files import local_path
    from tide_megatron.base.units import read_bytes
    from tide_megatron.convert.megatron_to_hf import Written
    from tide_megatron.convert.megatron_to_hf import megatron_to_hf as convert
    from tide_megatron.launch.ranks import run_ranks

    size = read_bytes(shard_size if shard_gb is None else f"{round(shard_gb * 1e9)}B", "--shard-size")
    written = Written(dtype=_torch(dtype), shard_bytes=size, force=force)
    places = (local_path(source), local_path(target), config and local_path(config))
    found = run_ranks(convert, (*places, written), ranks, "cpu")
    kept = f" ({found['files_kept']} of an earlier try)" if found["files_kept"] else ""
    rich.print(
        f"{target}: {found['tensors']} tensors in {found['files']} files{kept}, {found['seconds']:.1f} s"
    )


def _torch(dtype: str) -> torch.dtype | None:
    """Return torch's dtype, or None for as stored."""
    import torch

    return {"stored": None, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
