"""A data file: in YAML, which sources a preparation reads, and what it does with them.

    tokenizer: models/student
    max_length: 512
    sources:
      - {path: "hub:allenai/tulu-3-sft-mixture", split: train, name: tulu}
      - {path: more/*.parquet, columns: {prompt: ask, response: said}, take: 10000}

Every option of `tide prepare` may stand there, and gives way to the one on the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.files import local_path
from tide_megatron.base.options import STRICT
from tide_megatron.base.settings import told, validated, yaml_mapping
from tide_megatron.data.sources.choice import Filters, OfAll, Share, SourceChoice, read_word

Value = TypeVar("Value")
_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataMixture:
    """What a data file says."""

    sources: tuple[SourceChoice, ...]
    """What is read, in this order."""
    filters: Filters = dataclasses.field(default_factory=Filters)
    """What is left out of all sources."""
    dedup: bool = False
    """Leave out conversations that were there before, in whatever source: the first one stays."""
    portion: tuple[Share, Share] | None = None
    """[FROM, TO]: keep conversations whose digest falls there, of 0 to 1: [0, 0.95] and [0.95, 1] have no
    chat in common."""
    tokenizer: str | None = None
    """The student's, as `--tokenizer`."""
    max_length: int | None = None
    """Most tokens a sample may have."""
    on_long: str = "error"
    """What happens to longer samples: `error`, `skip` or `truncate`."""
    on_bad: str = "stop"
    """What happens to records that cannot be used: `stop` or `skip`."""
    normalize: bool = False
    """Put all text into NFC."""
    learn: str = "last"
    """Which replies of a conversation are learnt: the `last`, or `all` but those of weight 0."""
    add_mask: bool = False
    """Add the mask token to the student's tokenizer where it has none."""
    teachers: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name -> place of each teacher that reads tokens of its own, as `--teacher`."""

    @model_validator(mode="after")
    def _is_possible(self) -> DataMixture:
        if self.portion is not None and not self.portion[0] < self.portion[1]:
            raise ValueError(f"portion: {list(self.portion)} is empty; write the smaller number first")
        return self

    @property
    def of_all(self) -> OfAll:
        """What holds for all sources."""
        return OfAll(filters=self.filters, dedup=self.dedup, portion=self.portion)

    @property
    def student(self) -> str:
        """The place of the student's tokenizer.

        Raises:
            ConfigError: nobody says it.
        """
        return _given(self.tokenizer, "tokenizer")

    @property
    def length(self) -> int:
        """Most tokens of a sample.

        Raises:
            ConfigError: nobody says it.
        """
        return _given(self.max_length, "max_length")


def chosen_mixture(
    words: Sequence[str], file: Path | None, shape: str, given: Mapping[str, Any]
) -> DataMixture:
    """Return what a call means by its sources or its data file, and by its options.

    Args:
        words: paths, or hub:OWNER/NAME[,KEY=VALUE]...; a single one that ends in .yaml is a data file.
        file: a data file, in their place.
        shape: of the sources that are words.
        given: options by key, which go before the file's; None: not given.

    Raises:
        ConfigError: naming file, key, value and remedy.
        DataError: there is no source.
    """
    if file is None and len(words) == 1 and words[0].endswith(_ENDINGS):
        file, words = local_path(words[0]), ()
    options = {key: value for key, value in given.items() if value is not None}
    if file is None:
        mixture = mixture_of({"sources": [read_word(word, shape) for word in words], **options})
    elif words or shape != "auto":
        raise ConfigError(f"{file}: sources and their shapes stand in the data file: name them there")
    else:
        mixture = mixture_of({**_read(file), **options}, f"{file}: ")
    if not mixture.sources:
        raise DataError("sources: there are none: name at least one file of chats, or - for stdin")
    return mixture


def mixture_of(values: Mapping[str, Any], place: str = "") -> DataMixture:
    """Check what a data file says; `place` stands before every key of a message.

    Raises:
        ConfigError: naming key, value and remedy.
    """
    return validated(DataMixture, values, place, noun="data file")


def _read(file: Path) -> dict[str, Any]:
    tree = yaml_mapping(file, "data", "examples are under configs/data/")
    try:
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as fault:
        raise ConfigError(f"{file}: {told(fault)}; fix it there") from None
    assert isinstance(plain, dict), "a mapping was read"
    return {str(key): value for key, value in plain.items()}


def _given(value: Value | None, key: str) -> Value:
    if value is None:
        raise ConfigError(f"{key}: is required: give --{key.replace('_', '-')}, or {key} in a data file")
    return value
