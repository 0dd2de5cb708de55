"""Every key of a recipe, as a reader looks it up: docs/recipe.md and `tide recipe` come from the fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.base.options import Option, described, options_of
from tide_megatron.losses import LOSSES
from tide_megatron.train.recipe import Recipe

INTRODUCTION = """# The recipe

Made from the option classes by `tide recipe --markdown`; a test keeps it current. A run file is YAML over
these keys; `key=value` on the command line goes before it, `include:` lists fragments that go behind it. Keys
marked **machine** choose devices, layouts or reports: runs that differ only in them are the same run, and a
run folder can be gone on with after they changed. All others are mathematics. *Paper* is what TIDE (arXiv
2604.26951) used, where it says so.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The options of one part of a recipe."""

    key: str
    """Dotted, with NAME or TERM where the recipe gives a name; empty: the recipe itself."""
    meaning: str
    options: list[Option]
    is_machine: bool


def sections() -> Iterator[Section]:
    """Yield all parts of a recipe, each before those inside it."""
    yield from _sections(Recipe, "", is_machine=False)
    for name, kind in LOSSES.items():
        yield Section(
            key=f"losses.TERM (kind: {name})",
            meaning=_first_line(kind),
            options=list(options_of(kind)),
            is_machine=False,
        )


def as_markdown() -> str:
    """Return docs/recipe.md."""
    parts = [INTRODUCTION]
    for section in sections():
        parts.append(f"## {section.key or 'Top level'}\n\n{section.meaning}\n")
        lines = ["| key | type | default | paper | meaning |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(_cells(section, option))} |" for option in section.options]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def explain(key: str) -> str:
    """Return what there is to know about one key, or about all keys under it, as plain text.

    Args:
        key: dotted, as in a recipe; names of teachers and terms may be given or left out.

    Raises:
        ConfigError: there is no such key.
    """
    found, known = [], []
    for section in sections():
        for option in section.options:
            path = _path(section, option)
            known.append(path)
            if _matches(key, path):
                found.append(_told(section, option, path))
    if not found:
        raise ConfigError(f"{key}: no such key in a recipe; {nearest(key, known)}")
    return "\n\n".join(found)


def _sections(kind: type[Any], key: str, *, is_machine: bool) -> Iterator[Section]:
    options = list(options_of(kind))
    yield Section(key=key, meaning=_first_line(kind), options=options, is_machine=is_machine)
    for option in options:
        if option.nested is not None:
            name = ".NAME" if option.is_named else ""
            below = f"{key}.{option.name}{name}".lstrip(".")
            yield from _sections(option.nested, below, is_machine=is_machine or option.is_machine)


def _path(section: Section, option: Option) -> str:
    return f"{section.key.partition(' ')[0]}.{option.name}".lstrip(".")


def _matches(key: str, path: str) -> bool:
    """Say whether a path is the key asked for, or stands under it."""
    asked, parts = key.split("."), path.split(".")
    pairs = zip(asked, parts, strict=False)
    return len(asked) <= len(parts) and all(mine in (part, "") or part.isupper() for mine, part in pairs)


def _told(section: Section, option: Option, path: str) -> str:
    of = section.key.partition(" ")[2]
    lines = [f"{path} {of}".rstrip(), f"  {_meaning(option)}"]
    lines.append(f"  {described(option.kind)}; {_default(option)}")
    if option.paper:
        lines.append(f"  paper: {option.paper}")
    lines.append(f"  {'machine choice' if section.is_machine or option.is_machine else 'mathematics'}")
    return "\n".join(lines)


def _cells(section: Section, option: Option) -> list[str]:
    is_machine = section.is_machine or option.is_machine
    meaning = ("**machine** " if is_machine else "") + _meaning(option)
    default = _default(option).removeprefix("default ")
    return [
        f"`{option.name}`",
        described(option.kind),
        default,
        option.paper or "",
        meaning.replace("|", "\\|"),
    ]


def _meaning(option: Option) -> str:
    text = option.meaning or (_first_line(option.nested) if option.nested else "")
    return text.replace("None:", "null:")


def _default(option: Option) -> str:
    if option.is_required:
        return "required"
    if option.nested is not None:
        return "see below"
    return f"default {json.dumps(option.default)}"


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").partition("\n")[0]
