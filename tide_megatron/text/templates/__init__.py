"""Chat templates as data: those of this package, by name, and those that come with a tokenizer.

The package's own are for tokenizers without one (tiktoken, SentencePiece) and for models whose template was
changed. They are written from what the models are trained on (spec section 5): `qwen3` (thinking off),
`llada2`, `chatml` (WeDLM).
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError, nearest
from tide_megatron.text.backends.files import CONFIG_FILE

TEMPLATE_FILE = "chat_template.jinja"


def template_names() -> list[str]:
    """Return the names of the package's templates."""
    files = importlib.resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja"))


def packaged_template(name: str) -> tuple[str, str]:
    """Return source and origin of a template of this package.

    Raises:
        DataError: there is none of this name.
    """
    if name not in template_names():
        raise DataError(f"template: {name!r} is unknown: {nearest(name, template_names())}")
    file = importlib.resources.files(__name__) / f"{name}.jinja"
    return file.read_text(encoding="utf-8"), f"template {name}"


def find_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return source and origin of a tokenizer's own template: the file, else the configuration's.

    Args:
        folder: where the tokenizer is.
        config: content of its `tokenizer_config.json`; of several templates the one named default counts,
            and the name of one of the package's stands for it.

    Raises:
        DataError: the configuration's is no text.
    """
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8"), str(file)
    source, origin = config.get("chat_template"), str(folder / CONFIG_FILE)
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(f"{origin}: chat_template must be text, or a list with an entry named default")
    return packaged_template(source) if source in template_names() else (source, origin)
