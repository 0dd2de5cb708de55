"""Which token is a folder's mask: what its files name, and nothing else.

A model that is shown another mask token than it was trained with does not crash, it predicts badly. So the
mask is what the folder says, in `tokenizer_config.json`, `special_tokens_map.json` (a spelling),
`config.json` or `generation_config.json` (an id); places that disagree, with each other or with what was
asked for, are refused. Where the folder names none, `<|mask|>` is it if the tokenizer has that token. A token
is added to the vocabulary only on request: the model has to learn it first.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError, nearest
from tide_megatron.text.backends import Backend
from tide_megatron.text.backends.files import CONFIG_FILE, read_json

logger = logging.getLogger(__name__)

USUAL = "<|mask|>"
"""The mask token of a folder that names none."""
MOST_TRIED = 4
"""Tokens that may have been meant instead, at most."""
MASK_TOKEN, MASK_ID = "mask_token", "mask_token_id"
SPECIAL_MAP, MODEL_CONFIGS = "special_tokens_map.json", ("config.json", "generation_config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """What one place says: a spelling or an id."""

    place: str
    spelling: str | None = None
    token_id: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settled:
    """The mask token of a tokenizer; it is in the vocabulary."""

    spelling: str
    was_added: bool
    """Although no file of the folder gives it its id."""
    rivals: tuple[int, ...]
    """Other special tokens that sound like a mask, where no file of the folder names one."""


def named_masks(folder: Path, config: Mapping[str, Any]) -> list[Naming]:
    """Return every place of a folder that names a mask token.

    Args:
        folder: where the tokenizer's and the model's files stand; any of them may be missing.
        config: content of its `tokenizer_config.json`.

    Raises:
        DataError: a file is broken, or what it names is neither a spelling nor an id.
    """
    found = list(_spelt(config, folder / CONFIG_FILE))
    if (folder / SPECIAL_MAP).is_file():
        found += _spelt(read_json(folder / SPECIAL_MAP), folder / SPECIAL_MAP)
    for file in (folder / name for name in MODEL_CONFIGS):
        token = read_json(file).get(MASK_ID) if file.is_file() else None
        if token is not None:
            if not isinstance(token, int) or isinstance(token, bool):
                raise DataError(f"{file}: {MASK_ID}: {token!r} is no token id: write a whole number, or null")
            found.append(Naming(place=f"{file}: {MASK_ID}", token_id=token))
    return found


def settle_mask(
    backend: Backend, file: Path, config: Mapping[str, Any], asked: str | None, *, add: bool
) -> Settled:
    """Decide which token is the mask; it is in the backend's vocabulary afterwards.

    Args:
        backend: the vocabulary; a token may be added to it.
        file: where it was read from; the folder's other files stand beside it.
        config: content of its `tokenizer_config.json`.
        asked: the spelling that the caller insists on; None: what the folder names.
        add: the caller asks for the token to be added where the vocabulary lacks it.

    Raises:
        DataError: the folder contradicts itself or the caller, or there is no mask token.
    """
    if asked is not None and not asked.strip():
        raise DataError(
            f"{file}: a mask token is needed and {asked!r} is none: pass its spelling, e.g. {USUAL!r}"
        )
    namings = named_masks(file.parent, config)
    spelt = {naming.place: _spelling_of(naming, backend, namings, asked) for naming in namings}
    for place, spelling in spelt.items():
        first = next(iter(spelt))
        if spelling != spelt[first]:
            raise DataError(
                f"{first} says {_shown(spelt[first], backend)} is the mask token, {place} says "
                f"{_shown(spelling, backend)}: correct the one that the model was not trained with"
            )
        if asked is not None and spelling != asked:
            raise DataError(
                f"{file}: mask token {_shown(asked, backend)} was asked for, but {place} says "
                f"{_shown(spelling, backend)}: leave mask out, or correct {place}"
            )
    chosen = asked or next(iter(spelt.values()), USUAL)
    if backend.find(chosen) is not None:
        others = () if spelt else _sounding(backend, chosen)
        return Settled(spelling=chosen, was_added=False, rivals=others)
    has_its_id = any(naming.token_id == backend.size for naming in namings)
    if not add and not has_its_id:
        raise DataError(_lacking(chosen, backend, file, is_named=bool(asked or spelt)))
    logger.info("%s has no %s: added with id %d", file, chosen, backend.add_special(chosen))
    others = () if has_its_id else _sounding(backend, chosen)
    return Settled(spelling=chosen, was_added=not has_its_id, rivals=others)


def _spelt(content: Mapping[str, Any], file: Path) -> Iterator[Naming]:
    """Yield the mask token that a tokenizer's file spells; newer ones may keep it among the extra tokens."""
    extra = content.get("extra_special_tokens")
    parts = {"": content, "extra_special_tokens.": extra if isinstance(extra, dict) else {}}
    for prefix, part in parts.items():
        value = part.get(MASK_TOKEN)
        spelling = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        if not isinstance(spelling, str) or not spelling.strip():
            raise DataError(
                f"{file}: {prefix}{MASK_TOKEN}: {value!r} is no token: write its spelling, or null"
            )
        yield Naming(place=f"{file}: {prefix}{MASK_TOKEN}", spelling=spelling)


def _spelling_of(naming: Naming, backend: Backend, namings: list[Naming], asked: str | None) -> str:
    """Return the spelling that a place means.

    An id right behind the vocabulary is that of a spelling which is named elsewhere and which the vocabulary
    lacks: both together say what the token is, as they do to transformers.
    """
    if naming.spelling is not None:
        return naming.spelling
    assert naming.token_id is not None, "a place names a spelling or an id"
    if naming.token_id in backend.special:
        return backend.special[naming.token_id]
    elsewhere = next((other.spelling for other in namings if other.spelling), asked)
    if naming.token_id == backend.size and elsewhere and backend.find(elsewhere) is None:
        return elsewhere
    raise DataError(
        f"{naming.place}: {naming.token_id} is no special token of the tokenizer beside it, whose ids end at "
        f"{backend.size - 1}: correct it, or copy the tokenizer that belongs to the model"
    )


def _shown(spelling: str, backend: Backend) -> str:
    """Write a token with its id."""
    token = backend.find(spelling)
    return f"{spelling!r} ({'not in the vocabulary' if token is None else f'id {token}'})"


def _sounding(backend: Backend, chosen: str) -> tuple[int, ...]:
    """Return the special tokens but one that call themselves a mask, the first few."""
    others = (token for token, spelling in backend.special.items() if "mask" in spelling.lower())
    return tuple(sorted(token for token in others if backend.special[token] != chosen)[:MOST_TRIED])


def _lacking(chosen: str, backend: Backend, file: Path, *, is_named: bool) -> str:
    """Say that there is no such token, and how to come by one."""
    missing = f"the mask token {chosen!r} is not in the vocabulary"
    said = missing if is_named else f"no file names a mask token, and {chosen!r} is not in the vocabulary"
    similar = [backend.special[token] for token in _sounding(backend, chosen)]
    if similar:
        return f"{file}: {said}: name the one that the model was trained with (mask), perhaps {similar[0]!r}"
    hint = (
        nearest(chosen, backend.special.values()) if is_named else "name the one it was trained with (mask)"
    )
    return (
        f"{file}: {said}: {hint}; a model that never had one gets one by `tide model add-mask {file.parent}`"
    )
