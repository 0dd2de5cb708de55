"""The special tokens that a folder names, from the same files and in the same order as under transformers.

`tokenizer_config.json` names them under `*_token` keys, as text or as objects with a `content`, and in
`extra_special_tokens` (or `model_specific_special_tokens`) when that is an object. `special_tokens_map.json`,
which older folders have, goes before both unless the configuration lists `added_tokens_decoder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError
from tide_megatron.text.backends.files import ADDED, CONFIG_FILE, read_json

MAP_FILE = "special_tokens_map.json"
_NAMED = ("model_specific_special_tokens", "extra_special_tokens")


def read_special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return spellings by name: `eos_token`, `bos_token`, ... and names that a model has made up.

    Args:
        folder: where the tokenizer is.
        config: content of its `tokenizer_config.json`.

    Raises:
        DataError: a broken file, or a token that is no text.
    """
    named = _tokens_of(config, folder / CONFIG_FILE)
    file = folder / MAP_FILE
    if file.is_file() and ADDED not in config:
        named |= _tokens_of(read_json(file), file)
    return named


def seen_by(
    template: Sequence[str | None] | None, named: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, str]:
    """Return the special tokens that count: those of the configuration's own keys, and what a template names.

    Others change nothing, and counting them would give data of earlier releases another tokenizer digest.
    """
    source = (template[0] if template else None) or ""
    return {name: token for name, token in named.items() if name in config or name in source}


def kept_tokens(named: Mapping[str, str]) -> dict[str, object]:
    """Return what `tokenizer_config.json` needs so that the same tokens are read back."""
    kept: dict[str, object] = {name: token for name, token in named.items() if name.endswith("_token")}
    others = {name: token for name, token in named.items() if name not in kept}
    return kept | ({"extra_special_tokens": others} if others else {})


def _tokens_of(content: Mapping[str, Any], file: Path) -> dict[str, str]:
    found = {}
    for name, value in content.items():
        if name.endswith("_token") and (spelling := _spelling(value)) is not None:
            found[name] = spelling
    for key in _NAMED:
        extra = content.get(key)
        for name, value in extra.items() if isinstance(extra, dict) else ():
            spelling = _spelling(value)
            if spelling is None:
                raise DataError(f"{file}: {key}.{name}: {value!r} is no token: write its spelling")
            found[name] = spelling
    return found


def _spelling(value: object) -> str | None:
    spelling = value.get("content") if isinstance(value, dict) else value
    return spelling if isinstance(spelling, str) else None
