"""What a model folder or a loaded model holds, as one short word: to know it again, or to compare copies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.file_samples import take_in
from tide_megatron.models.hf.config import read_config

_IDLE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of config.json that say nothing of the model."""


def fingerprint(folder: Path, *, weights: bool) -> str:
    """Digest a model folder's config.json and, if asked for, its weights (sha256, 16 hexadecimal digits).

    Large files of weights are sampled (`base.file_samples`): enough to tell two models apart that were
    trained differently.

    Args:
        folder: config.json and safetensors.
        weights: False: only config.json counts.

    Raises:
        CheckpointError: something cannot be read.
    """
    config = {key: value for key, value in read_config(folder).items() if key not in _IDLE}
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    try:
        for path in sorted(folder.glob("*.safetensors")) if weights else []:
            take_in(path, found)
    except OSError as fault:
        raise CheckpointError(f"{folder}: its weights cannot be read ({fault})") from None
    return found.hexdigest()[:16]


def sampled_weights(parameters: Iterable[Tensor], samples: int = 64) -> str:
    """Digest loaded weights, wherever they are (sha256, 16 hexadecimal digits).

    Args:
        parameters: equal ones, in the same order, give the same word.
        samples: elements of each that count, at equal distances.
    """
    taken = []
    for parameter in parameters:
        flat = parameter.detach().flatten()
        step = max(1, len(flat) // samples)
        taken.append(flat[::step][:samples].contiguous().view(torch.uint8))
    found = torch.cat(taken).cpu() if taken else torch.empty(0, dtype=torch.uint8)
    return hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16]
