"""Kinds of vocabulary files, a module each; what all of them can do; and which one a file is.

`Backend` is all that `Tokenizer` needs of a vocabulary, and no more.

A token is SPECIAL when its spelling, found in a text, always becomes that one id: added tokens, control
pieces. All other tokens come from the kind's own way to cut a text.

A kind may put a space in front of a text that has none (the dummy prefix of SentencePiece). `piece` then
gives it as a space, and `spelling.py`, which knows the text, counts it as no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tide_megatron.base.errors import DataError
from tide_megatron.text.backends.files import MODEL_FILE, RANKS, TOKENIZER_FILE


class Backend(Protocol):
    """One tokenizer of some kind."""

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
