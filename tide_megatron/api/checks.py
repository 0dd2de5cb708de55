"""Options objects from what a caller gave; errors name the option as the command line spells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tide_megatron.evaluate.options import Arithmetic

Options = TypeVar("Options")
LONGEST_WAIT_SECONDS = 24 * 3600.0
"""For the rank whose replies take longest; one that is killed ends the others at once."""


def arithmetic_of(precision: str, engine: str, fp8: str | None) -> Arithmetic:
    """Read how a model's answers are to be computed.

    Raises:
        ConfigError: a word that is not known, naming its option.
    """
    from tide_megatron.evaluate.options import Arithmetic

    words = {"precision": precision, "engine": engine, "fp8": fp8 and {"recipe": fp8}}
    return checked(Arithmetic, words)


def checked(kind: Callable[..., Options], words: Mapping[str, Any]) -> Options:
    """Make an options object of what a caller gave.

    Args:
        kind: of the object.
        words: its fields.

    Raises:
        ConfigError: a value that cannot be, naming its option.
    """
    from pydantic import ValidationError

    from tide_megatron.base.errors import ConfigError

    try:
        return kind(**words)
    except ValidationError as fault:
        first = fault.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option}: {first['input']!r} is not valid: {first['msg']}") from None
