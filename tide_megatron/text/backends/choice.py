"""Open a vocabulary by what its file is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError
from tide_megatron.text.backends.backend import Backend
from tide_megatron.text.backends.files import MODEL_FILE, RANKS, TOKENIZER_FILE


def open_backend(file: Path, config: Mapping[str, Any]) -> Backend:
    """Open a vocabulary; its library is imported only then.

    Args:
        file: what `find_file` found.
        config: content of the `tokenizer_config.json` beside it; empty: there is none.

    Raises:
        DataError: the file is broken or of no known kind, or the configuration does not go with it.
    """
    if file.suffix == ".json":
        from tide_megatron.text.backends.huggingface import HuggingFace

        return HuggingFace.read(file)
    if file.suffix == RANKS:
        from tide_megatron.text.backends.tiktoken import Tiktoken

        return Tiktoken.read(file, config)
    if file.suffix == ".model":
        from tide_megatron.text.backends.sentencepiece import SentencePiece

        return SentencePiece.read(file, config)
    raise DataError(f"{file}: not a tokenizer by its name: give {TOKENIZER_FILE}, *{RANKS} or {MODEL_FILE}")
