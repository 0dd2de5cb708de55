"""The context a model was trained in, written beside its weights: no Hugging Face config has a key for it.

Whoever reads the model without it must say the context, because a wrong one does not crash: it writes bad
text.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.mask import Context

CONTEXT_FILE = "tide_context.json"


def write_context(folder: Path, context: Context) -> None:
    """Write a model folder's context."""
    text = json.dumps(dataclasses.asdict(context), indent=1)
    (folder / CONTEXT_FILE).write_text(text + "\n", encoding="utf-8")


def trained_context(folder: Path, kind: str | None = None, block_size: int | None = None) -> Context:
    """Return the context to read a model in: what was asked for, else what its folder says.

    Args:
        folder: the model's.
        kind: context kind; None: the folder's.
        block_size: tokens; None: the folder's.

    Raises:
        ConfigError: something was not said and the folder does not say it either.
    """
    file, said = Path(folder) / CONTEXT_FILE, {}
    if file.is_file():
        try:
            said = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ConfigError(f"{file}: not readable; give --context and --block-size") from None
    kind, block_size = kind or said.get("kind"), block_size or said.get("block_size")
    if kind is None or (block_size is None and kind != "bidirectional"):
        raise ConfigError(
            f"{folder}: does not say what context it was trained in ({CONTEXT_FILE} is missing); "
            "give --context and --block-size"
        )
    return Context(kind=kind, block_size=block_size or 1)  # type: ignore[arg-type] # Context checks the word
