"""Settings in YAML: a file's one mapping, checked against an options class, in words for users.

OmegaConf reads (it refuses a key that is written twice); pydantic checks. The complaints of both become one
`ConfigError` that names the key, the value and the nearest legal choice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from tide_megatron.base.errors import ConfigError, nearest

Kind = TypeVar("Kind")


def yaml_mapping(file: Path, noun: str, examples: str) -> DictConfig:
    """Read one YAML mapping.

    Args:
        file: to read.
        noun: what it is, for messages.
        examples: where to look for such files.

    Raises:
        ConfigError: there is none, or it is no mapping.
    """
    try:
        tree = OmegaConf.create(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such {noun} file; check the path ({examples})") from None
    except AssertionError:  # OmegaConf's answer to a lone number
        tree = None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as fault:
        raise ConfigError(f"{file}: not readable as YAML: {told(fault)}; fix the file") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{file}: a {noun} file is a mapping; write one `key: value` a line")
    return tree


def told(fault: Exception) -> str:
    """Say a library's complaint in one line, with its line number or key."""
    if isinstance(fault, yaml.MarkedYAMLError) and fault.problem_mark:
        return f"line {fault.problem_mark.line + 1}: {fault.problem}"
    key = getattr(fault, "full_key", None)
    return f"{key}: " * bool(key) + str(fault).partition("\n")[0]


def validated(kind: type[Kind], values: Mapping[str, Any], prefix: str, *, noun: str = "recipe") -> Kind:
    """Make an options class of plain values, or restate pydantic's first complaints.

    Strict, so that `steps: "4"` or `steps: true` is a wrong type; as JSON, where a list may be a tuple.

    Args:
        kind: the options class.
        values: by field.
        prefix: stands before every key of a message.
        noun: what is to be mended, for messages.

    Raises:
        ConfigError: an unknown key, a missing one, or a value that cannot be.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as fault:
        errors = sorted(fault.errors(), key=_is_missing)  # a misspelt key first, then what it leaves out
        lines = [_complaint(kind, error, prefix, noun) for error in errors[:5]]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _is_missing(error: Any) -> bool:
    return error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument")


def _complaint(kind: type[Any], error: Any, prefix: str, noun: str) -> str:
    """Say one pydantic error in our words: key, value, remedy."""
    path = [str(part) for part in error["loc"]]
    key = prefix + ".".join(path)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: unknown key; {nearest(path[-1], _fields_at(kind, path[:-1]))}"
    if _is_missing(error):
        return f"{key}: is required; set it in the {noun}"
    return f"{key}: {error['input']!r} is not valid: {error['msg'].removeprefix('Value error, ')}"


def _fields_at(kind: Any, path: Sequence[str]) -> list[str]:
    """Return the field names of the dataclass that a key path leads to (for the nearest-name hint)."""
    for part in path:
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        inner = hints.get(part, kind)
        options = [arg for arg in get_args(inner) if dataclasses.is_dataclass(arg)]
        kind = options[-1] if options else inner
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
