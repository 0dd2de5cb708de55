"""What a model folder holds, as one short word, so that a run knows it again wherever it was moved to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tide_megatron.base.errors import CheckpointError
from tide_megatron.models.hf.config import read_config

_BLOCKS, _BLOCK_BYTES, _WHOLE_BYTES = 256, 4096, 2**22
_IDLE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of config.json that say nothing of the model."""


def fingerprint(folder: Path, *, weights: bool) -> str:
    """Digest a model folder's config.json and, if asked for, its weights (sha256, 16 hexadecimal digits).

    Of a large file of weights its size and 256 blocks of 4 KB at equal distances are read, which takes
    moments where the whole takes minutes: enough to tell two models apart that were trained differently, not
    to find damage (`base.files.damage` does).

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
            size = path.stat().st_size
            found.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as stream:
                if size <= _WHOLE_BYTES:
                    found.update(stream.read())
                    continue
                for block in range(_BLOCKS):
                    stream.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                    found.update(stream.read(_BLOCK_BYTES))
    except OSError as fault:
        raise CheckpointError(f"{folder}: its weights cannot be read ({fault})") from None
    return found.hexdigest()[:16]
