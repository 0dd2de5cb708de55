"""Kinds of vocabulary files, a module each; what all of them can do; and which one a file is.

`Backend` is all that `Tokenizer` needs of a vocabulary, and no more. A new kind is one file here and one line
of `BACKENDS`.

A token is SPECIAL when its spelling, found in a text, always becomes that one id: added tokens, control
pieces. All other tokens come from the kind's own way to cut a text.

A kind may put a space in front of a text that has none (the dummy prefix of SentencePiece). `piece` then
gives it as a space, and `spelling.py`, which knows the text, counts it as no bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tide_megatron.base.errors import DataError

BACKENDS: dict[str, str] = {
    "tokenizer.json": "huggingface.HuggingFace",
    "*.tiktoken": "tiktoken.Tiktoken",
    "tokenizer.model": "sentencepiece.SentencePiece",
}
"""Name of the file in a tokenizer folder -> module here and class that read it. A file that is given itself
may have any name with this ending. In a folder, the first counts before the others, because one that has it
beside another kind says the same twice. Classes are named, not imported: a run needs one kind's library."""


class Backend(Protocol):
    """One tokenizer of some kind."""

    @classmethod
    def read(cls, file: Path, config: Mapping[str, Any]) -> Backend:
        """Read a vocabulary; see `open_backend`."""

    @property
    def size(self) -> int:
        """The highest id plus one."""

    @property
    def special(self) -> Mapping[int, str]:
        """Spelling of each special token."""

    @property
    def advice(self) -> str:
        """What to do about a tokenizer of this kind that changes text; ends a sentence."""

    def encode(self, text: str, *, opening: bool = True) -> list[int]:
        """Return ids; special spellings are recognised, nothing is added but a dummy prefix.

        Args:
            text: any text.
            opening: False: the text goes on behind another one, so that no prefix may come.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does."""

    def decode(self, ids: Sequence[int], *, keep_special: bool) -> str:
        """Return the text of ids, without the dummy prefix; bytes that are not UTF-8 become U+FFFD."""

    def piece(self, token_id: int) -> bytes | None:
        """Return the bytes of a token, those of a dummy prefix among them; None: no token has this id.

        Raises:
            DataError: tokens of this tokenizer have no bytes.
        """

    def find(self, spelling: str) -> int | None:
        """Return the id of a spelling; None: the vocabulary lacks it."""

    def add_special(self, spelling: str) -> int:
        """Add a special token behind the last id and return its id."""

    def content(self) -> dict[str, object]:
        """Return everything that decides ids, in a form that does not change when it is written and read."""

    def save(self, folder: Path) -> dict[str, object]:
        """Write the vocabulary into a folder; return what belongs into `tokenizer_config.json`."""


def find_file(path: Path) -> Path:
    """Return the file that holds the vocabulary: the path itself, or the one in this folder.

    Raises:
        DataError: there is none, or more than one.
    """
    first, *others = BACKENDS
    looked_for = f"a tokenizer is a folder with {first}, or else one of {', '.join(others)}, or such a file"
    if not path.exists():
        raise DataError(f"{path}: not found; {looked_for}")
    if not path.is_dir():
        return path
    if (path / first).is_file():
        return path / first
    found = [file for name in others for file in sorted(path.glob(name))]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{path}: {looked_for}; found {names}" + (": give the file instead" if found else ""))
    return found[0]


def open_backend(file: Path, config: Mapping[str, Any]) -> Backend:
    """Open a vocabulary; its library is imported only then.

    Args:
        file: what `find_file` found.
        config: content of the `tokenizer_config.json` beside it; empty: there is none.

    Raises:
        DataError: the file is broken or of no known kind, or the configuration does not go with it.
    """
    for name, place in BACKENDS.items():
        if file.suffix == Path(name).suffix:
            module, _, kind = place.partition(".")
            backend: type[Backend] = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
            return backend.read(file, config)
    raise DataError(f"{file}: not a tokenizer by its name: give {', '.join(BACKENDS)}")
