"""A tokenizer as the rest of the package knows it: ids, bytes of tokens, special ids, a chat template.

`Tokenizer.load` reads a local Hugging Face folder (`tokenizer.json`, and where they exist
`tokenizer_config.json` and `chat_template.jinja`) or a bare `tokenizer.json`. Nothing is downloaded.
Ordinary tokenizers have no mask token: it is added behind the last id, and the log says which id it got,
because the model must have a row for it.

`digest` names the tokenizer by content (entries, merges, pre-processing, special ids, template), so that a
data set can refuse another one. `token_bytes` is the view that alignment between two tokenizers stands on:
the bytes a token contributes to the text. Today it knows the byte-level alphabet of GPT-2, Qwen and LLaDA2;
tiktoken and SentencePiece files will be further constructors of this class, with a byte table of their own.

Left out: the `transformers` tokenizer classes. They add seconds of import and options that change ids
behind one's back.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tide_megatron.base.errors import DataError
from tide_megatron.text.chat import ChatTemplate

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """One tokenizer with its special ids and its chat template. Made by `load`, never by hand.

    `vocabulary_size` is the highest id plus one: a model needs at least that many rows.
    """

    backend: Any
    name: str
    """Where it came from, for messages."""
    vocabulary_size: int
    mask_id: int
    eos_id: int
    pad_id: int
    mask_was_added: bool
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
        mask: str = "<|mask|>",
        eos: str | None = None,
        pad: str | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> Tokenizer:
        """Load a local tokenizer.

        Args:
            path: a folder with `tokenizer.json`, or that file.
            mask: the mask token; added behind the last id where the vocabulary lacks it.
            eos: the end token; default: the configuration's `eos_token`.
            pad: the padding token; default: the configuration's `pad_token`, else the end token.
            variables: extra variables of the chat template; default `enable_thinking=False` (spec section 5).

        Raises:
            DataError: a file is missing or broken, or a special token cannot be had.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        description = _read_json(file)
        config = _read_json(file.parent / CONFIG_FILE) if (file.parent / CONFIG_FILE).is_file() else {}
        backend = _parse(file, description)
        mask_was_added = backend.token_to_id(_checked_mask(mask, file)) is None
        if mask_was_added:
            backend.add_special_tokens([mask])
            logger.info("%s has no %s: added with id %d", path, mask, backend.token_to_id(mask))
        named = _named_tokens(config)
        eos = eos or named.get("eos_token")
        if eos is None:
            raise DataError(f"{file}: no end token: pass eos, or set eos_token in {CONFIG_FILE}")
        pad = pad or named.get("pad_token") or eos
        ids = {
            name: _find(backend, token, name, file)
            for name, token in (("mask", mask), ("eos", eos), ("pad", pad))
        }
        if ids["mask"] in (ids["eos"], ids["pad"]):
            raise DataError(
                f"{file}: the mask token {mask!r} is also the end or padding token: choose another mask"
            )
        named |= {"mask_token": mask, "eos_token": eos, "pad_token": pad}
        return cls(
            backend=backend,
            name=str(path),
            vocabulary_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            mask_id=ids["mask"],
            eos_id=ids["eos"],
            pad_id=ids["pad"],
            mask_was_added=mask_was_added,
            special_tokens=named,
            chat=_read_template(file.parent, config, named, variables),
            vocabulary_digest=_digest_of(backend, ids),
        )

    @property
    def digest(self) -> str:
        """Name the tokenizer and its template by content: what a data set remembers (sha256, hexadecimal)."""
        template = self.chat.digest if self.chat else ""
        return hashlib.sha256(f"{self.vocabulary_digest}{template}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special tokens written in it are recognised, none are added."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and, for each, the half-open range of characters of `text` it stands for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=not keep_special)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds to the text (an added token: its own spelling in UTF-8).

        Raises:
            DataError: the id is outside the vocabulary, or the tokenizer is not a byte-level one.
        """
        if (
            not 0 <= token_id < self.vocabulary_size
            or (spelling := self.backend.id_to_token(token_id)) is None
        ):
            raise DataError(f"{self.name}: no token has id {token_id} (vocabulary: {self.vocabulary_size})")
        if token_id in self._added:
            return self._added[token_id].encode()
        if not self._is_byte_level:
            raise DataError(
                f"{self.name}: the bytes of its tokens are known for byte-level vocabularies only"
            )
        table = byte_of_character()
        return bytes(table[character] for character in spelling)

    @functools.cached_property
    def _added(self) -> dict[int, str]:
        return {
            token_id: token.content for token_id, token in self.backend.get_added_tokens_decoder().items()
        }

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        plain = (t for t, i in self.backend.get_vocab(with_added_tokens=True).items() if i not in self._added)
        table = byte_of_character()
        return all(character in table for token in plain for character in token)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, the mask token and the template among them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / TOKENIZER_FILE))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat:
            config["chat_template"] = self.chat.source
        (folder / CONFIG_FILE).write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Return the byte behind each character of the byte-level alphabet.

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on, in
    order (GPT-2's rule, the same in every byte-level vocabulary).
    """
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    return {chr(byte): byte for byte in itself} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object or say which file is at fault."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{file}: not found; a tokenizer is a folder with {TOKENIZER_FILE}, or that file"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); copy the tokenizer again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: must hold a JSON object")
    return content


def _parse(file: Path, description: dict[str, Any]) -> Any:
    """Build the backend; truncation and padding settings in the file are switched off."""
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file}: not a tokenizer ({error}); copy the tokenizer again") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _checked_mask(mask: str, file: Path) -> str:
    if not mask.strip():
        raise DataError(
            f"{file}: a mask token is needed and {mask!r} is none: pass its spelling, e.g. '<|mask|>'"
        )
    return mask


def _find(backend: Any, token: str, name: str, file: Path) -> int:
    """Return the id of a special token; it must also come back as ONE id when text is encoded."""
    token_id: int | None = backend.token_to_id(token)
    if token_id is None:
        raise DataError(f"{file}: the {name} token {token!r} is not in the vocabulary: name one that is")
    if backend.encode(token, add_special_tokens=False).ids != [token_id]:
        raise DataError(
            f"{file}: the {name} token {token!r} is not kept whole: list it among the added tokens"
        )
    return token_id


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return `*_token` entries, which may be strings or objects with a `content`."""
    named = {}
    for key, value in config.items():
        spelling = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(spelling, str):
            named[key] = spelling
    return named


def _read_template(
    folder: Path, config: Mapping[str, Any], named: Mapping[str, str], variables: Mapping[str, object] | None
) -> ChatTemplate | None:
    """Find the chat template: the `.jinja` file, else the configuration's (of several, its `default`)."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        source: Any = file.read_text(encoding="utf-8")
        origin = file
    else:
        source, origin = config.get("chat_template"), folder / CONFIG_FILE
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(f"{origin}: chat_template must be text, or a list with an entry named default")
    given = {"enable_thinking": False} if variables is None else dict(variables)
    return ChatTemplate(source=source, origin=str(origin), variables=given, special_tokens=dict(named))


def _digest_of(backend: Any, ids: Mapping[str, int]) -> str:
    """Digest what decides ids, in a form that does not depend on the library's way of writing files."""
    content = json.loads(backend.to_str())
    model = content["model"]
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in model.pop("merges", None) or []
    ]
    added = [(token["id"], token["content"]) for token in content["added_tokens"]]
    known = {
        "model": {key: value for key, value in model.items() if value},
        "merges": merges,
        "added": sorted(added),
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
        "ids": dict(ids),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
