"""Give a model a mask token: an entry in its tokenizer, and a row of its embedding and output head.

A language model that was never a diffusion model has no token that stands for a masked one. The new row is
the mean of the rows that tokens have, with a little noise. Nobody has trained it yet: the student's run does.

A vocabulary that is padded has rows that no token has, and the token takes the first of them; else the
matrices grow by a row. All other tensors and files are copied as they are.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.files import DIGESTS, refuse_damaged, replaced_folder
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.hf.config import CONFIG_FILE, HfConfig, read_config, write_config
from tide_megatron.models.hf.folder import WEIGHTS, HfFolder
from tide_megatron.models.hf.safetensors import INDEX_FILE, TensorSpec, write_tensors
from tide_megatron.models.weights import check_names, read_architecture
from tide_megatron.text.backends.files import ADDED, TOKENIZER_FILE, read_json
from tide_megatron.text.backends.files import CONFIG_FILE as TOKENIZER_CONFIG
from tide_megatron.text.mask_token import MASK_ID, MASK_TOKEN, SPECIAL_MAP, USUAL, named_masks
from tide_megatron.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

ADDED_FILE = "added_tokens.json"
"""Where older tokenizers keep ids of added tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRow:
    """How the new row is made."""

    token: str = USUAL
    """Spelling of the mask token."""
    noise: float = 0.1
    """Standard deviation of the noise, as a share of that of the rows that tokens have."""
    seed: int = 42
    """Of the noise."""

    def __post_init__(self) -> None:
        """Refuse what can be no token and no noise."""
        if not self.token.strip():
            raise ConfigError(f"--token: {self.token!r} is no token; use for example {USUAL!r}")
        if not 0.0 <= self.noise <= 1.0:
            raise ConfigError(f"--noise: {self.noise} is not in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedMask:
    """What was added."""

    folder: Path
    token: str
    token_id: int
    rows_before: int
    rows: int
    tensors: list[str]
    """Names of the matrices that have the new row."""


def add_mask(folder: Path, target: Path | None, row: MaskRow) -> AddedMask:
    """Add a mask token to a model folder. On one rank.

    Args:
        folder: config.json, safetensors and tokenizer.
        target: folder to make; None: the new one takes the place of `folder`, as a whole.
        row: the token and its row.

    Returns:
        What was added; the log says it, too.

    Raises:
        ConfigError: a mask token exists, or the target does.
        DataError: no tokenizer that can be added to.
        CheckpointError: weights that are damaged or do not fit config.json, or a disk that refuses; nothing
            has changed.
    """
    if target is not None and target.exists():
        raise ConfigError(f"{target}: exists; choose a folder that does not")
    architecture = read_architecture(folder)
    tokenizer = _with_mask(folder, row.token)
    token, rows = tokenizer.mask_id, max(architecture.vocabulary, tokenizer.mask_id + 1)
    if rows > architecture.vocabulary + 1:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.vocabulary_size - 1} ids, its model only "
            f"{architecture.vocabulary} rows; give it the tokenizer that it was trained with"
        )
    refuse_damaged(folder, (0, 1))
    known = torch.tensor([used for used in range(token) if tokenizer.has(used)])
    with replaced_folder(target or folder.resolve(), WEIGHTS) as partial, HfFolder(folder) as source:
        check_names(architecture, source)
        grown = _grown(architecture, source)
        _copy_files(folder, partial)
        config = read_config(folder)
        write_config(partial, config | _counts(config, architecture, rows, token) | {MASK_ID: token})
        _write_tokenizer(partial, tokenizer, row.token)
        plan = {
            name: TensorSpec((rows, *shape[1:]) if name in grown else shape, source.dtype(name))
            for name, shape in source.shapes.items()
        }
        seeds = {
            name: row.seed if architecture.tied else row.seed + place for place, name in enumerate(grown)
        }
        write_tensors(partial, plan, _tensors(source, rows, token, known, row.noise, seeds))
        _check(partial, token, rows)
    log.info(
        "%s: mask token %s has id %d: %s; its row is the mean of those of %d tokens, with noise of %g of "
        "their deviation (seed %d), in %s. Nobody has trained it yet",
        *(target or folder, row.token, token),
        f"a spare one of {rows} rows" if rows == architecture.vocabulary else f"a new row, the {rows}th",
        *(len(known), row.noise, row.seed, ", ".join(grown)),
    )
    return AddedMask(
        folder=target or folder,
        token=row.token,
        token_id=token,
        rows_before=architecture.vocabulary,
        rows=rows,
        tensors=grown,
    )


def _with_mask(folder: Path, token: str) -> Tokenizer:
    """Return a folder's tokenizer with the token added.

    Raises:
        ConfigError: it has a mask token.
    """
    file = folder / TOKENIZER_CONFIG
    named = named_masks(folder, read_json(file) if file.is_file() else {})
    if named:
        said = named[0].spelling or named[0].token_id
        raise ConfigError(f"{named[0].place} says {said!r}: the model has a mask token; nothing was changed")
    tokenizer = Tokenizer.load(folder, mask=token, add_mask=True)
    if not tokenizer.mask_was_added:
        raise ConfigError(
            f"{folder}: the tokenizer has {token!r} (id {tokenizer.mask_id}); if the model was trained with "
            f'it as its mask, write "{MASK_TOKEN}": {json.dumps(token)} into {TOKENIZER_CONFIG}, else choose '
            "another --token"
        )
    for rival in tokenizer.mask_rivals:
        log.warning("%s: special token %s sounds like a mask", folder, tokenizer.backend.special[rival])
    return tokenizer


def _grown(architecture: Architecture, source: HfFolder) -> list[str]:
    """Return the names of the matrices with a row for each token: embedding, and head where one is stored."""
    names = (architecture.embedding_name, f"{architecture.names.head}.weight")
    return [name for name in names if name in source.shapes]


def _tensors(
    source: HfFolder, rows: int, token: int, known: Tensor, noise: float, seeds: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a folder, some with the new row; one at a time is in memory.

    Args:
        source: the folder.
        rows: how many the matrices have afterwards.
        token: the new row's number.
        known: ids of the tokens there are.
        noise: see `MaskRow`.
        seeds: matrix with a row for each token -> seed of its noise; the embedding's for a tied head that is
            stored as well, so that both stay equal.
    """
    for name in source.shapes:
        whole = source.read(name)
        if name in seeds:
            used = whole[known].float()
            drawn = torch.randn(whole.shape[1], generator=torch.Generator().manual_seed(seeds[name]))
            made = used.mean(dim=0) + noise * used.std(dim=0, correction=0) * drawn
            whole = torch.cat([whole, whole.new_zeros(rows - len(whole), whole.shape[1])])
            whole[token] = made.to(whole.dtype)
        yield name, whole


def _counts(config: HfConfig, architecture: Architecture, rows: int, token: int) -> dict[str, int]:
    """Return the keys of config.json that count rows, or ids where those are counted apart, if changed."""
    if rows > architecture.vocabulary:
        return {key: rows for key in ("vocab_size", "embedding_size") if key in config}
    return {"vocab_size": token + 1} if config["vocab_size"] <= token else {}


def _copy_files(folder: Path, partial: Path) -> None:
    """Copy what is no weight: texts, templates, code."""
    for path in sorted(folder.iterdir()):
        if path.name in (INDEX_FILE, DIGESTS, CONFIG_FILE) or path.name.endswith(WEIGHTS):
            continue
        if path.is_dir():
            shutil.copytree(path, partial / path.name)
        else:
            shutil.copyfile(path, partial / path.name)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, token: str) -> None:
    """Write the token into every file of a folder that lists tokens, as transformers and we read them."""
    settings = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    entry = {"content": token, **settings}
    file = folder / TOKENIZER_FILE
    if file.is_file():
        content = read_json(file)
        content["added_tokens"] = [*(content.get("added_tokens") or []), {"id": tokenizer.mask_id, **entry}]
        _write(file, content)
    file = folder / TOKENIZER_CONFIG
    content = read_json(file) if file.is_file() else {}
    if ADDED in content or not (folder / TOKENIZER_FILE).is_file():
        content[ADDED] = {**content.get(ADDED, {}), str(tokenizer.mask_id): entry}
    _write(file, content | {MASK_TOKEN: token})
    if (folder / SPECIAL_MAP).is_file():
        _write(folder / SPECIAL_MAP, read_json(folder / SPECIAL_MAP) | {MASK_TOKEN: token})
    if (folder / ADDED_FILE).is_file():
        _write(folder / ADDED_FILE, read_json(folder / ADDED_FILE) | {token: tokenizer.mask_id})


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(folder: Path, token: int, rows: int) -> None:
    """Read a finished folder as a run will.

    Raises:
        DataError: the tokenizer does not take the token so.
    """
    found, architecture = Tokenizer.load(folder), read_architecture(folder)
    assert architecture.vocabulary == rows, f"config.json says {architecture.vocabulary} rows, not {rows}"
    if found.mask_id != token or found.mask_was_added:
        raise DataError(
            f"{folder}: its tokenizer gives the mask token id {found.mask_id} instead of {token}; nothing "
            "was changed"
        )
