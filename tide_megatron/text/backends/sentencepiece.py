"""`tokenizer.model` of SentencePiece.

The library finds no control piece (`</s>`) in text, so special spellings are cut out first and only what is
between them goes through it. The space that it puts in front of a text comes once, at the very start: a
text that goes on, behind a special token or a prompt, has none. That is what chat models were trained on.

Special tokens beyond the model's own stand in `tokenizer_config.json`, under `added_tokens_decoder`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from tide_megatron.base.errors import DataError
from tide_megatron.text.backends.files import CONFIG_FILE, MODEL_FILE, read_added, write_added

SPACE = "\u2581"
_NO_PREFIX = b"\x1a\x02\x18\x00"
"""A model file in protocol buffers that says only `normalizer_spec { add_dummy_prefix: false }`: messages
are merged by writing one behind the other."""


class SentencePiece:
    """One model with its special tokens."""

    advice = (
        "use a model whose normalisation is the identity and that keeps repeated spaces, or fix the record"
    )

    def __init__(self, file: Path, model: bytes, added: Mapping[int, str]) -> None:
        """Hold the parts; `read` makes one from a file."""
        self._model, self._added = model, dict(added)
        self._opening, self._continuing = _parse(file, model), _parse(file, model + _NO_PREFIX)
        self._model_size: int = self._opening.get_piece_size()
        for token, spelling in added.items():
            if token < self._model_size and self._opening.id_to_piece(token) != spelling:
                raise DataError(
                    f"{file.parent / CONFIG_FILE}: special token {spelling!r} has id {token}, which is "
                    f"{self._opening.id_to_piece(token)!r} in {file.name}: give it an id of its own"
                )

    @classmethod
    def read(cls, file: Path, config: Mapping[str, Any]) -> SentencePiece:
        """Read a model; see `open_backend`."""
        try:
            model = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); copy the tokenizer again") from None
        return cls(file, model, read_added(config, file))

    @property
    def size(self) -> int:
        """The highest id plus one."""
        return max([self._model_size - 1, *self._added]) + 1

    @functools.cached_property
    def special(self) -> Mapping[int, str]:
        """Control pieces of the model, and added tokens."""
        control = filter(self._opening.is_control, range(self._model_size))
        return {token: self._opening.id_to_piece(token) for token in control} | self._added

    def encode(self, text: str, *, opening: bool = True) -> list[int]:
        """Return ids; see `Backend`."""
        ids: list[int] = []
        for place, part in self._parts(text):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            else:
                library = self._opening if opening and place == 0 else self._continuing
                ids.extend(library.encode(part, out_type=int))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids of each text; see `Backend`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, keep_special: bool) -> str:
        """Return text; see `Backend`."""
        kept = [token for token in ids if keep_special or token not in self.special]
        text = b"".join(self.piece(token) or b"" for token in kept).decode(errors="replace")
        has_prefix = self._adds_prefix and kept and kept[0] not in self.special
        return text.removeprefix(" ") if has_prefix else text

    def piece(self, token_id: int) -> bytes | None:
        """Return the bytes of a token; see `Backend`. A piece for unknown text has its own spelling."""
        if token_id in self.special:
            return self.special[token_id].encode()
        if not 0 <= token_id < self._model_size:
            return None
        spelling: str = self._opening.id_to_piece(token_id)
        if self._opening.is_byte(token_id):
            return bytes([int(spelling[3:5], 16)])
        return spelling.replace(SPACE, " ").encode()

    def find(self, spelling: str) -> int | None:
        """Return the id of a spelling."""
        if spelling in self._special_ids:
            return self._special_ids[spelling]
        token: int = self._opening.piece_to_id(spelling)  # an unknown spelling gets the unknown piece's id
        return token if self._opening.id_to_piece(token) == spelling else None

    def add_special(self, spelling: str) -> int:
        """Add a special token behind the last id; see `Backend`."""
        token = self.size
        self._added[token] = spelling
        for name in ("special", "_special_ids", "_special_text"):
            self.__dict__.pop(name, None)
        return token

    def content(self) -> dict[str, object]:
        """Return what decides ids; see `Backend`."""
        return {
            "kind": "sentencepiece",
            "model": hashlib.sha256(self._model).hexdigest(),
            "added": sorted(self._added.items()),
        }

    def save(self, folder: Path) -> dict[str, object]:
        """Write the model; see `Backend`."""
        (folder / MODEL_FILE).write_bytes(self._model)
        return write_added(self._added)

    @functools.cached_property
    def _adds_prefix(self) -> bool:
        return bool(self._opening.encode("x", out_type=str)[0].startswith(SPACE))

    @functools.cached_property
    def _special_ids(self) -> dict[str, int]:
        return {spelling: token for token, spelling in self.special.items()}

    @functools.cached_property
    def _special_text(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_ids, key=lambda spelling: (-len(spelling), spelling))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _parts(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield special spellings and what is between them, each with its place."""
        place = 0
        for match in self._special_text.finditer(text):
            if match.start() > place:
                yield place, text[place : match.start()]
            yield match.start(), match[0]
            place = match.end()
        if place < len(text):
            yield place, text[place:]


def _parse(file: Path, model: bytes) -> Any:
    """Build the library's object."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # the library raises RuntimeError and its own
        raise DataError(f"{file}: not a SentencePiece model ({error}); copy the tokenizer again") from None
