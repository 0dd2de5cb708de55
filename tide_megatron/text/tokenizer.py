"""A tokenizer as the rest of the package knows it: ids, bytes of tokens, special ids, a chat template.

`Tokenizer.load` reads a local folder (`tokenizer.json` of Hugging Face, tiktoken's ranks or a SentencePiece
model, and where they exist `tokenizer_config.json` and `chat_template.jinja`) or one such file. Nothing is
downloaded. The mask token is the one that the folder names (`mask_token.py`). Ordinary tokenizers have none:
on request it is added behind the last id, and the log says which id it got, because the model must have a row
for it.

`digest` names the tokenizer by content (entries, merges, pre-processing, special ids, template), so that a
data set can refuse another one. `token_bytes` is the view that alignment between two tokenizers stands on:
the bytes a token contributes to the text; `ends` checks that view against the text itself.

Left out: the `transformers` tokenizer classes. They add seconds of import and options that change ids
behind one's back.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from tide_megatron.base.errors import DataError
from tide_megatron.text.backends import Backend, find_file, open_backend
from tide_megatron.text.backends.files import CONFIG_FILE, read_json
from tide_megatron.text.mask_token import settle_mask
from tide_megatron.text.rendering import check_options, names_in
from tide_megatron.text.special_tokens import kept_tokens, read_special_tokens, seen_by
from tide_megatron.text.spelling import ends_of
from tide_megatron.text.templates import TOOLS, ChatTemplate, find_template, packaged_template

OPTIONS = "chat_template_kwargs"
"""Key of `tokenizer_config.json` that keeps options of the chat template for those who read the folder
next."""
DEFAULT_OPTIONS = {"enable_thinking": False}
_MOST_ENDS = 4096
"""Most ends of prompts whose ids are remembered."""
Ends = NDArray[numpy.int64]
"""Byte of a text behind each of its tokens, never descending."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """One tokenizer with its special ids and its chat template. Made by `load`, never by hand.

    `vocabulary_size` is the highest id plus one: a model needs at least that many rows.
    """

    backend: Backend
    name: str
    """Where it came from, for messages."""
    vocabulary_size: int
    mask_id: int
    eos_id: int
    pad_id: int
    mask_was_added: bool
    """On request; no file of the folder gives it its id."""
    mask_rivals: tuple[int, ...]
    """Other special tokens that sound like a mask, where no file of the folder names one: the model may have
    been trained with one of these."""
    special_tokens: Mapping[str, str]
    """Named special tokens (`eos_token`, `bos_token`, ...) as the template may use them."""
    chat: ChatTemplate | None
    vocabulary_digest: str
    """sha256 of everything that decides the ids, the special ids among it; without the template."""

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        mask: str | None = None,
        add_mask: bool = False,
        eos: str | None = None,
        pad: str | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        template: str | None = None,
    ) -> Tokenizer:
        """Load a local tokenizer.

        Args:
            path: a folder with a file that `BACKENDS` names, or that file.
            mask: the mask token, which may not be another one than the folder names; None: the folder's, or
                `<|mask|>` where it names none.
            add_mask: add it behind the last id where the vocabulary lacks it.
            eos: the end token; default: the configuration's `eos_token`.
            pad: the padding token; default: the configuration's `pad_token`, else the end token.
            chat_template_kwargs: options of the chat template, on top of those that the folder keeps and of
                `enable_thinking=False` (spec section 5); one that is None is taken out.
            template: name of a chat template of this package, which then goes before the folder's own.

        Raises:
            ConfigError: an option that the template does not read.
            DataError: a file is missing or broken, or a special token cannot be had or is contradicted.
        """
        file = find_file(Path(path))
        config = read_json(file.parent / CONFIG_FILE) if (file.parent / CONFIG_FILE).is_file() else {}
        backend = open_backend(file, config)
        settled = settle_mask(backend, file, config, mask, add=add_mask)
        mask = settled.spelling
        every = read_special_tokens(file.parent, config)
        eos = eos or every.get("eos_token")
        if eos is None:
            raise DataError(f"{file}: no end token: pass eos, or set eos_token in {CONFIG_FILE}")
        pad = pad or every.get("pad_token") or eos
        ids = {
            name: _find(backend, token, name, file)
            for name, token in (("mask", mask), ("eos", eos), ("pad", pad))
        }
        _check_mask(backend, mask, ids, file)
        found = packaged_template(template) if template else find_template(file.parent, config)
        named = seen_by(found, every, config) | {"mask_token": mask, "eos_token": eos, "pad_token": pad}
        return cls(
            backend=backend,
            name=str(path),
            vocabulary_size=backend.size,
            mask_id=ids["mask"],
            eos_id=ids["eos"],
            pad_id=ids["pad"],
            mask_was_added=settled.was_added,
            mask_rivals=settled.rivals,
            special_tokens=named,
            chat=_chat_of(found, _options(config, file.parent, chat_template_kwargs), named),
            vocabulary_digest=_digest_of(backend, ids),
        )

    @property
    def digest(self) -> str:
        """Name the tokenizer and its template by content: what a data set remembers (sha256, hexadecimal)."""
        template = self.chat.digest if self.chat else ""
        return hashlib.sha256(f"{self.vocabulary_digest}{template}".encode()).hexdigest()

    def encode(self, text: str, *, opening: bool = True) -> list[int]:
        """Return the ids of `text`; special tokens written in it are recognised, none are added.

        Args:
            text: any text.
            opening: False: it goes on behind another text (no space in front for those that put one there).
        """
        return self.backend.encode(text, opening=opening)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does."""
        return self.backend.encode_batch(texts)

    def behind_special(self, token_id: int, text: str) -> list[int]:
        """Return the ids of a special token's spelling and of the text that follows it.

        What follows a special token is encoded alike whatever stands before it, so these ids stand at the end
        of every text that ends in both. The last few are remembered: prompts end in the same few ways.
        """
        key = (token_id, text)
        found = self._ends_of_prompts.get(key)
        if found is None:
            if len(self._ends_of_prompts) >= _MOST_ENDS:
                self._ends_of_prompts.clear()
            found = self._ends_of_prompts[key] = self.encode(self.backend.special[token_id] + text)
        return found

    def all_ends(self, ids: Sequence[Sequence[int]], texts: Sequence[bytes]) -> list[Ends | None]:
        """Return, for many texts in UTF-8, the byte behind each of the ids that stand for each.

        None: the bytes of its tokens are not the text just so; `ends` says whether they are with a space in
        front, and else what is wrong.
        """
        counts = numpy.fromiter(map(len, ids), dtype=numpy.int64, count=len(ids))
        flat = numpy.fromiter(itertools.chain.from_iterable(ids), numpy.int64, int(counts.sum()))
        last = numpy.cumsum(counts)
        behind = numpy.zeros(len(flat) + 1, dtype=numpy.int64)
        spelt = self._bytes.spell(flat, behind[1:])
        places = behind[numpy.concatenate([last[:1] * 0, last])].tolist()
        ends = behind[1:] - numpy.repeat(behind[last - counts], counts)
        return [
            ends[stop - count : stop] if spelt[begin:end] == text else None
            for stop, count, (begin, end), text in zip(
                last.tolist(), counts.tolist(), itertools.pairwise(places), texts, strict=True
            )
        ]

    def ends(self, ids: Sequence[int], text: str) -> list[int]:
        """Return the byte of `text` behind each of the ids that stand for it, never descending.

        Raises:
            SpellingError: the tokens spell something else; says where, and what to do.
        """
        return ends_of(
            pieces=[self._bytes[token] for token in ids],
            is_special=[self.is_special(token) for token in ids],
            text=text,
            who=self.name,
            advice=self.backend.advice,
        )

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(ids, keep_special=keep_special)

    def has(self, token_id: int) -> bool:
        """Say whether some token has this id (vocabularies may have gaps)."""
        try:
            return 0 <= token_id < self.vocabulary_size and self.backend.piece(token_id) is not None
        except DataError:  # there is one, but nobody knows its bytes
            return True

    def is_special(self, token_id: int) -> bool:
        """Say whether the spelling of this token always becomes this one id, wherever it stands in a text."""
        return token_id in self.backend.special

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds to the text (a special token: its own spelling in UTF-8).

        Raises:
            DataError: the id is outside the vocabulary, or tokens of this tokenizer have no bytes.
        """
        return self._bytes[token_id]

    @functools.cached_property
    def _ends_of_prompts(self) -> dict[tuple[int, str], list[int]]:
        return {}

    @functools.cached_property
    def _bytes(self) -> _Pieces:
        return _Pieces(self)

    def save(self, folder: Path) -> None:
        """Write the vocabulary and `tokenizer_config.json`, the mask token and the template among them."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.backend.save(folder), **kept_tokens(self.special_tokens)}
        if self.chat:
            config |= _kept_chat(self.chat)
        (folder / CONFIG_FILE).write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


class _Pieces(dict[int, bytes]):
    """Bytes of tokens, asked for once each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._lengths = numpy.full(tokenizer.vocabulary_size, -1, dtype=numpy.int64)
        self._starts = numpy.zeros(tokenizer.vocabulary_size, dtype=numpy.int64)
        self._all = bytearray()
        """Bytes of the tokens that were asked for; `_starts` and `_lengths` say where each stands."""

    def spell(self, ids: NDArray[numpy.int64], behind: NDArray[numpy.int64]) -> bytes:
        """Return the bytes of tokens, one behind the other.

        Args:
            ids: [tokens].
            behind: [tokens], filled with the number of bytes up to the end of each.
        """
        if self._lengths[ids].min(initial=0) < 0:
            for token in dict.fromkeys(ids[self._lengths[ids] < 0].tolist()):
                self._starts[token], self._lengths[token] = len(self._all), len(self[token])
                self._all += self[token]
        lengths = self._lengths[ids]
        numpy.cumsum(lengths, out=behind)
        known = numpy.frombuffer(self._all, dtype=numpy.uint8)
        index = numpy.repeat(self._starts[ids] - behind + lengths, lengths)
        index += numpy.arange(len(index))
        return known[index].tobytes()

    def __missing__(self, token_id: int) -> bytes:
        known = 0 <= token_id < self._tokenizer.vocabulary_size
        piece = self._tokenizer.backend.piece(token_id) if known else None
        if piece is None:
            raise DataError(
                f"{self._tokenizer.name}: no token has id {token_id} "
                f"(vocabulary: {self._tokenizer.vocabulary_size})"
            )
        self[token_id] = piece
        return piece


def _check_mask(backend: Backend, mask: str, ids: Mapping[str, int], file: Path) -> None:
    """Refuse a mask token that text or padding may hold."""
    if ids["mask"] in (ids["eos"], ids["pad"]):
        raise DataError(
            f"{file}: the mask token {mask!r} is also the end or padding token: choose another mask"
        )
    if ids["mask"] not in backend.special:
        raise DataError(f"{file}: the mask token {mask!r} is ordinary text: choose another mask")


def _find(backend: Backend, token: str, name: str, file: Path) -> int:
    """Return the id of a special token; it must also come back as ONE id when text is encoded."""
    token_id = backend.find(token)
    if token_id is None:
        raise DataError(f"{file}: the {name} token {token!r} is not in the vocabulary: name one that is")
    if backend.encode(token, opening=False) != [token_id]:
        raise DataError(
            f"{file}: the {name} token {token!r} is not kept whole: list it among the added tokens"
        )
    return token_id


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a chat template is rendered with, and which of it was asked for."""

    values: Mapping[str, object]
    asked: Mapping[str, object]


def _options(config: Mapping[str, Any], folder: Path, given: Mapping[str, object] | None) -> _Options:
    """Lay options over those that the folder keeps, and these over the default."""
    kept = config.get(OPTIONS) or {}
    if not isinstance(kept, dict):
        raise DataError(f"{folder / CONFIG_FILE}: {OPTIONS}: must be an object, not {kept!r}")
    asked = {**kept, **(given or {})}
    values = {**DEFAULT_OPTIONS, **asked}
    return _Options(
        {name: value for name, value in values.items() if value is not None},
        {
            name: value
            for name, value in asked.items()
            if not (name in DEFAULT_OPTIONS and value in (None, DEFAULT_OPTIONS[name]))
        },
    )


def _chat_of(
    found: tuple[str, str, str | None] | None, options: _Options, named: Mapping[str, str]
) -> ChatTemplate | None:
    """Return the chat template with what it is rendered with; None: there is none."""
    if found is None:
        return None
    source, origin, tools = found
    if options.asked:
        known = names_in(source, origin) | (names_in(tools, origin) if tools else set())
        check_options(options.asked, known, origin)
    return ChatTemplate(
        source=source,
        origin=origin,
        variables=options.values,
        special_tokens=dict(named),
        tool_source=tools,
    )


def _kept_chat(chat: ChatTemplate) -> dict[str, object]:
    """Return what `load` needs to find the same template and options."""
    named = {"default": chat.source} | ({TOOLS: chat.tool_source} if chat.tool_source else {})
    entries = [{"name": name, "template": source} for name, source in named.items()]
    kept: dict[str, object] = {"chat_template": entries if chat.tool_source else chat.source}
    if chat.variables != DEFAULT_OPTIONS:
        kept[OPTIONS] = {**dict.fromkeys(DEFAULT_OPTIONS), **chat.variables}
    return kept


def _digest_of(backend: Backend, ids: Mapping[str, int]) -> str:
    """Digest what decides ids."""
    known = {**backend.content(), "ids": dict(ids)}
    return hashlib.sha256(json.dumps(known, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
