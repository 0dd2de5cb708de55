"""Model folders of any size without their bytes: true headers and index, holes for weights.

A file system keeps a hole as nothing and reads it as zeros, so a folder of 32 GB takes some hundred KB of
disk, and whoever slices it does all the work of slicing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tide_megatron.models.architecture import Architecture
from tide_megatron.models.hf.config import write_config
from tide_megatron.models.hf.safetensors import (
    TensorSpec,
    file_header,
    planned_bytes,
    split_plan,
    write_index,
)
from tide_megatron.models.params import param_mappings
from tide_megatron.models.weights import read_architecture


def write_sparse(folder: Path, config: Mapping[str, Any], shard_bytes: int = 5_000_000_000) -> Architecture:
    """Make a model folder of holes, bf16 but for router biases, and return what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, {**config, "torch_dtype": "bfloat16"})
    architecture = read_architecture(folder)
    plan = {
        name: TensorSpec(shape, torch.bfloat16 if piece.is_parameter else torch.float32)
        for piece in param_mappings(architecture)
        for name, shape in piece.sources.items()
    }
    files = split_plan(plan, shard_bytes)
    for name, tensors in files.items():
        with (folder / name).open("wb") as file:
            start = file.write(file_header(tensors))
            file.truncate(start + planned_bytes(tensors))
    if len(files) > 1:
        write_index(folder, files)
    return architecture
