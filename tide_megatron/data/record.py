"""Records: chats in JSONL files, one `{"messages": [{"role": ..., "content": ...}, ...]}` a line.

Other keys of a line (a source, an id) are allowed and not read. What is wrong with a record is said with
file and line, before anything is written: a training set is only as good as its worst line, so nothing is
repaired or skipped here. Left out: compressed files, other formats, tool calls.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError, nearest

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRecord:
    """One conversation; its last message is the assistant's reply."""

    messages: tuple[dict[str, str], ...]
    file: Path
    line: int
    size_bytes: int
    """Bytes of the line in its file, for progress."""

    @property
    def place(self) -> str:
        """Return `file:line`, the start of every message about this record."""
        return f"{self.file}:{self.line}"


def read_records(file: Path) -> Iterator[ChatRecord]:
    """Yield the records of one JSONL file in order; blank lines are passed over.

    Raises:
        DataError: the file cannot be read, or a line is not a conversation that ends with a reply.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, file, number)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}): give the path of a JSONL file") from None


def _parse(line: bytes, file: Path, number: int) -> ChatRecord:
    """Turn one line into a record."""
    place = f"{file}:{number}"
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 ({error.reason}): convert the file to UTF-8") from None
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}): write one JSON object per line") from None
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f'{place}: no messages: a record is {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
        )
    checked = tuple(
        _checked(message, f"{place}: message {index}") for index, message in enumerate(messages, 1)
    )
    if checked[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: no reply: the last message must be the assistant's, it is the {checked[-1]['role']}'s"
        )
    if len(checked) == 1:
        raise DataError(f"{place}: a reply without a request: put a user message before it")
    return ChatRecord(messages=checked, file=file, line=number, size_bytes=len(line))


def _checked(message: Any, place: str) -> dict[str, str]:
    """Return role and content of one message, or say what is wrong with them."""
    if not isinstance(message, dict):
        raise DataError(f"{place}: must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{place}: unknown role {role!r}: {nearest(str(role), ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{place}: the {role}'s content is empty: fill it or remove the record")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: content holds half of a surrogate pair: write the character whole"
        ) from None
    return {"role": role, "content": content}
