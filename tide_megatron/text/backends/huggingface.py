"""`tokenizer.json` of Hugging Face, through the `tokenizers` library.

Two alphabets have a byte view. Byte-level vocabularies (GPT-2, Qwen, LLaDA2) write each byte as one
character. Those that came from SentencePiece write a space as U+2581 and, with byte fallback, a lone byte as
`<0xNN>`. Others (WordPiece) lose bytes and can encode, but not align.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tide_megatron.base.errors import DataError
from tide_megatron.text.backends.files import TOKENIZER_FILE, read_json

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFace:
    """One `tokenizer.json`."""

    advice = "take the normalizer out of tokenizer.json, or use another tokenizer"

    def __init__(self, file: Path, library: Any) -> None:
        """Wrap the library's object; `read` makes one from a file."""
        self._file, self._library = file, library
        self._continuing: Any = None

    @classmethod
    def read(cls, file: Path, config: Mapping[str, Any]) -> HuggingFace:
        """Read a file, which says all; truncation and padding settings in it are switched off."""
        return cls(file, _parse(file, read_json(file)))

    @property
    def size(self) -> int:
        """The highest id plus one."""
        return int(max(self._library.get_vocab(with_added_tokens=True).values())) + 1

    @functools.cached_property
    def special(self) -> Mapping[int, str]:
        """Added tokens, special to the library or not: all are recognised in text."""
        return {token: entry.content for token, entry in self._library.get_added_tokens_decoder().items()}

    def encode(self, text: str, *, opening: bool = True) -> list[int]:
        """Return ids; see `Backend`."""
        library = self._library if opening else self._without_prefix()
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids of each text; see `Backend`. This form of the library's counts no characters."""
        return [found.ids for found in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, keep_special: bool) -> str:
        """Return text; see `Backend`."""
        text: str = self._library.decode(list(ids), skip_special_tokens=not keep_special)
        return text

    def piece(self, token_id: int) -> bytes | None:
        """Return the bytes of a token; see `Backend`."""
        spelling: str | None = self._library.id_to_token(token_id)
        if spelling is None:
            return None
        if token_id in self.special:
            return spelling.encode()
        if self._is_byte_level:
            table = byte_of_character()
            return bytes(table[character] for character in spelling)
        if not self._has_spaces:
            raise DataError(
                f"{self._file}: the bytes of its tokens are known for byte-level vocabularies and those with "
                f"{SPACE} for a space only"
            )
        if self._falls_back and (match := BYTE.fullmatch(spelling)):
            return bytes([int(match[1], 16)])
        return spelling.replace(SPACE, " ").encode()

    def find(self, spelling: str) -> int | None:
        """Return the id of a spelling."""
        token: int | None = self._library.token_to_id(spelling)
        return token

    def add_special(self, spelling: str) -> int:
        """Add a special token behind the last id; see `Backend`."""
        self._library.add_special_tokens([spelling])
        self.__dict__.pop("special", None)
        self._continuing = None
        return int(self._library.token_to_id(spelling))

    def content(self) -> dict[str, object]:
        """Return what decides ids, in a form that does not depend on the library's way of writing files."""
        content = json.loads(self._library.to_str())
        model = content["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.pop("merges", None) or []]
        return {
            "model": {key: value for key, value in model.items() if value},
            "merges": merges,
            "added": sorted((token["id"], token["content"]) for token in content["added_tokens"]),
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
        }

    def save(self, folder: Path) -> dict[str, object]:
        """Write `tokenizer.json`; see `Backend`."""
        self._library.save(str(folder / TOKENIZER_FILE))
        return {"tokenizer_class": "PreTrainedTokenizerFast"}

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        entries = self._library.get_vocab(with_added_tokens=True)
        table = byte_of_character()
        return all(
            character in table
            for spelling, token in entries.items()
            if token not in self.special
            for character in spelling
        )

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self._library.to_str())
        return described

    @functools.cached_property
    def _has_spaces(self) -> bool:
        return any(
            part.get("type") == "Metaspace"
            or (part.get("pattern"), part.get("content")) == ({"String": SPACE}, " ")
            for part in _parts(self._description.get("decoder"))
        )

    @functools.cached_property
    def _falls_back(self) -> bool:
        return bool(self._description["model"].get("byte_fallback"))

    def _without_prefix(self) -> Any:
        """Return the same tokenizer without the step that puts a space in front (made when first needed)."""
        if self._continuing is None:
            described = json.loads(self._library.to_str())
            changed = {key: _drop_prefix(described.get(key)) for key in ("normalizer", "pre_tokenizer")}
            same = all(described.get(key) == step for key, step in changed.items())
            self._continuing = self._library if same else _parse(self._file, described | changed)
        return self._continuing


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


def _parse(file: Path, description: dict[str, Any]) -> Any:
    """Build the library's object."""
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file}: not a tokenizer ({error}); copy the tokenizer again") from None
    library.no_truncation()
    library.no_padding()
    return library


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a step of the description and the steps inside it."""
    if isinstance(part, dict):
        yield part
        for inner in (
            *part.get("decoders", ()),
            *part.get("normalizers", ()),
            *part.get("pretokenizers", ()),
        ):
            yield from _parts(inner)


def _drop_prefix(part: Any) -> Any:
    """Return a step of the description without what puts a space in front of a text."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**part, "add_prefix_space": False}
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            inner = [_drop_prefix(step) for step in part[key]]
            return {**part, key: [step for step in inner if step is not None]}
    return part
