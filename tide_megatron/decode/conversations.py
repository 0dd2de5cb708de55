"""What models are asked: conversations from words or from a JSONL file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError
from tide_megatron.base.read import is_text, text_of

_ROLES = ("system", "user", "assistant", "tool")
_FORM = (
    'a line is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, and may have an "id"'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation that ends where the assistant's turn begins."""

    messages: tuple[Mapping[str, str], ...]
    """With `role` and `content`."""
    id: str | int | None = None
    """What its user calls it."""


def conversation(prompt: str, system: str | None = None) -> Conversation:
    """Return the conversation of one user message.

    Args:
        prompt: the message.
        system: what stands before it; None: nothing.
    """
    before = [] if system is None else [{"role": "system", "content": system}]
    return Conversation(messages=(*before, {"role": "user", "content": prompt}))


def read_conversations(file: Path, system: str | None = None) -> list[Conversation]:
    """Read conversations from a file of JSON lines, each with `prompt` or `messages`.

    A conversation that ends with the assistant's message is asked without it.

    Args:
        file: of the lines; empty ones are passed over.
        system: put before conversations that have no system message of their own; None: nothing.

    Raises:
        DataError: the file, or the first line that is no conversation.
    """
    try:
        lines = text_of(file).splitlines()
    except FileNotFoundError:
        raise DataError(f"--input: {file} is not there; give a file of JSON lines") from None
    except ValueError as fault:
        raise DataError(f"--input: {file}: {fault}; give a file of JSON lines") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_conversation(json.loads(line), system))
            except (ValueError, RecursionError) as fault:
                reason = "nested too deep" if isinstance(fault, RecursionError) else fault
                raise DataError(f"--input: {file}, line {number}: {reason}; {_FORM}") from None
    if not found:
        raise DataError(f"--input: {file} has no line; {_FORM}")
    return found


def _conversation(record: Any, system: str | None) -> Conversation:
    """Read one record.

    Raises:
        ValueError: it is no conversation.
    """
    if not isinstance(record, dict):
        raise ValueError("no object")
    if not is_text(record):
        raise ValueError("half of a surrogate pair, which is no text")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError("both prompt and messages" if "prompt" in record else "neither prompt nor messages")
    name = record.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise ValueError(f"id is {name!r}, neither text nor a whole number")
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(f"no list of messages with a role ({', '.join(_ROLES)}) and text")
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no message of the user's")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(messages=tuple(messages), id=name)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in _ROLES
        and isinstance(message.get("content"), str)
    )


def digest_of(conversations: Sequence[Conversation]) -> str:
    """Name conversations by content (SHA-256, 16 hexadecimal digits)."""
    values = [[one.id, [dict(message) for message in one.messages]] for one in conversations]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
