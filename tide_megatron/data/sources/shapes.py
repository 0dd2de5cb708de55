"""Rows become records: shapes that are told by their columns, and columns that are named by hand.

| shape | columns |
|---|---|
| messages | `messages`: role and content of each; `tools` and all else that `data.sources.record` reads |
| sharegpt | `conversations`: from and value of each; `system`, `tools` |
| instruction | `instruction` and `output`; `input` |
| prompt_response | `prompt` and `response`, or `completion` |
| question_answer | `question` or `query`, and `answer` or `response` |

A row that could be read in two ways is refused, as is one that fits no shape: nothing is guessed. ColumnNames
that say something under other trainers' names travel on, and `data.sources.record` uses or refuses them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from tide_megatron.base.errors import RecordError, some_of
from tide_megatron.data.sources.choice import ColumnNames, SourceChoice
from tide_megatron.data.sources.record import MEANINGFUL

_SYSTEM, _INPUT = ("system", "system_prompt"), ("input", "context")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""What ShareGPT's `from` says -> our role; others stay, and are judged like every role."""
_CALL = "function_call"
_MOST_KINDS = 1000
"""Kinds of rows that are remembered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """ColumnNames by which rows are told: of each group exactly one."""

    messages: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()
    response: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The columns it needs."""
        return (self.messages,) if self.messages else (self.prompt, self.response)

    def __str__(self) -> str:
        return " + ".join(" or ".join(group) for group in self.groups)


SHAPES = {
    "messages": Shape(messages=("messages",)),
    "sharegpt": Shape(messages=("conversations", "conversation")),
    "instruction": Shape(prompt=("instruction",), response=("output", "response")),
    "prompt_response": Shape(prompt=("prompt",), response=("response", "completion")),
    "question_answer": Shape(prompt=("question", "query"), response=("answer", "response")),
}
KNOWN = "; ".join(f"{name} ({shape})" for name, shape in SHAPES.items())


def told_shape(names: Collection[str], wanted: str = "auto") -> tuple[str, ColumnNames]:
    """Tell by its columns which shape a row has, and which column is what.

    Args:
        names: of the columns.
        wanted: the shape it must have; `auto`: any.

    Raises:
        RecordError: none, or more than one.
    """
    shapes = SHAPES if wanted == "auto" else {wanted: SHAPES[wanted]}
    found = [name for name, shape in shapes.items() if all(any(n in names for n in g) for g in shape.groups)]
    here = f"columns {some_of(sorted(names))}" if names else "no columns"
    if not found:
        asked = f"; shape {wanted} needs {SHAPES[wanted]}" if wanted != "auto" else f"; known are {KNOWN}"
        _refuse(f"no messages: {here}{asked}; or name the columns in a data file", "no messages")
    if found[0] not in ("messages", "sharegpt") and len(found) > 1:
        _refuse(f"{here} can be read as {' or '.join(found)}: choose a shape", "columns of two shapes")
    name = found[0]
    picked = [[column for column in group if column in names] for group in shapes[name].groups]
    picked += [[column for column in group if column in names] for group in (_SYSTEM, _INPUT)]
    needed, optional = picked[:-2], picked[-2:]
    for columns in (*needed, *(optional if len(needed) > 1 else optional[: name == "sharegpt"])):
        if len(columns) > 1:
            _refuse(f"columns {' and '.join(columns)} can be one thing: name the one in a data file",
                    "columns of two shapes")  # fmt: skip
    system, below = (columns[0] if columns else None for columns in optional)
    if name == "messages":
        return name, ColumnNames(messages=needed[0][0])
    if name == "sharegpt":
        return name, ColumnNames(messages=needed[0][0], system=system)
    history = "history" if "history" in names else None
    return name, ColumnNames(
        prompt=needed[0][0], response=needed[1][0], input=below, system=system, history=history
    )


class RowMapping:
    """Turns the rows of one source into records."""

    def __init__(self, choice: SourceChoice) -> None:
        self._choice = choice
        self._known: dict[tuple[str, ...], ColumnNames] = {}
        self._used: dict[ColumnNames, frozenset[str]] = {}
        self.shapes: set[str] = set()
        """What was told."""

    @property
    def is_named(self) -> bool:
        """Whether the conversation's columns are named by hand."""
        return bool(self._choice.columns.messages or self._choice.columns.prompt)

    def columns_of(self, names: Sequence[str]) -> ColumnNames:
        """Return which column is what in rows with these names.

        Raises:
            RecordError: they have no shape, or lack a column that is named.
        """
        key = tuple(names)
        if key not in self._known:
            if len(self._known) >= _MOST_KINDS:
                self._known.clear()
            self._known[key] = columns = self._columns_of(names)
            self._used[columns] = frozenset(columns.names.values())
        return self._known[key]

    def _columns_of(self, names: Sequence[str]) -> ColumnNames:
        named = self._choice.columns
        if not self.is_named:
            shape, columns = told_shape(names, self._choice.shape)
            self.shapes.add(shape)
            own = {field: name for field, name in vars(named).items() if isinstance(name, str)}
            return dataclasses.replace(columns, **own)
        for what in ("messages", "prompt", "response"):
            column = getattr(named, what)
            if column is not None and column not in names:
                _refuse(
                    f"no column {column!r}, which columns.{what} names: there are {some_of(sorted(names))}",
                    "a column that is missing",
                )
        return named

    def record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record that a row says, not yet checked.

        Raises:
            RecordError: it has no shape, or a column of another kind.
        """
        columns = self.columns_of([*row])
        used = self._used[columns]
        record = {name: row[name] for name in MEANINGFUL if name in row and name not in used}
        for what in ("tools", "documents", "source"):
            if (column := getattr(columns, what)) is not None:
                record[what] = row.get(column)
        if self._choice.name is not None and columns.source is None:
            record["source"] = self._choice.name
        messages = self._messages(row, columns)
        self._put_system_first(messages, row.get(columns.system) if columns.system else None)
        record["messages"] = messages
        return record

    def _messages(self, row: Mapping[str, Any], columns: ColumnNames) -> list[Any]:
        if columns.messages is not None:
            return [self._message(entry, columns) for entry in _entries(row.get(columns.messages), columns)]
        messages = []
        for pair in _pairs(row.get(columns.history) if columns.history else None):
            messages += self._turn("user", pair[0], columns) + self._turn("assistant", pair[1], columns)
        prompt = row.get(columns.prompt or "")
        below = row.get(columns.input) if columns.input else None
        if below not in (None, ""):
            if not isinstance(prompt, str) or not isinstance(below, str):
                _refuse(f"column {columns.input!r}: only text can stand below a prompt", "input of no text")
            prompt = f"{prompt}\n\n{below}" if prompt else below
        messages += self._turn("user", prompt, columns)
        return messages + self._turn("assistant", row.get(columns.response or ""), columns)

    def _turn(self, role: str, value: Any, columns: ColumnNames) -> list[Any]:
        """Return the messages of one column: text is one of its role, a list is many."""
        if isinstance(value, list):
            return [self._message(entry, columns) for entry in value]
        return [{"role": role, "content": value}]

    def _message(self, entry: Any, columns: ColumnNames) -> Any:
        """Return a message under our names; what is none stays, and is refused as such."""
        if not isinstance(entry, dict):
            return entry
        role_key = columns.role or ("role" if "role" in entry else "from")
        text_key = columns.content or ("content" if "content" in entry else "value")
        message = {key: value for key, value in entry.items() if key not in (role_key, text_key)}
        role, text = entry.get(role_key), entry.get(text_key)
        if isinstance(role, str):
            role = self._choice.roles.get(role) or (_ROLES.get(role, role) if role_key == "from" else role)
        if role == _CALL:
            return {**message, "role": "assistant", "tool_calls": _calls(text)}
        if text is not None or text_key in entry:
            message["content"] = text
        return {"role": role, **message}

    def _put_system_first(self, messages: list[Any], text: Any) -> None:
        """Put a system message before a conversation that has none."""
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        has_one = first.get("role") in ("system", "developer")
        if text not in (None, ""):
            if has_one and first.get("content") != text:
                _refuse("a system message, and another one in a column: keep one", "two system messages")
            if not has_one:
                messages.insert(0, {"role": "system", "content": text})
        elif self._choice.system_prompt is not None and not has_one:
            messages.insert(0, {"role": "system", "content": self._choice.system_prompt})


def _entries(value: Any, columns: ColumnNames) -> list[Any]:
    """Return a conversation's messages: a list, its JSON, or a table of columns as `datasets` writes some."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            _refuse(f"column {columns.messages!r}: text that is no JSON list of messages", "no messages")
    parts = [*value.values()] if isinstance(value, dict) else []
    if parts and all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
        return [dict(zip(value, entry, strict=True)) for entry in zip(*parts, strict=True)]
    if value is None:
        return []
    if not isinstance(value, list):
        _refuse(f"column {columns.messages!r}: no list of messages", "no messages")
    return list(value)


def _pairs(value: Any) -> list[Any]:
    """Return earlier turns."""
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        _refuse("history: pairs of prompt and reply were expected", "history of another form")
    return value


def _calls(text: Any) -> list[Any]:
    """Return the tool calls that ShareGPT's `function_call` holds as JSON."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        _refuse(f"{_CALL}: text that is no JSON: write name and arguments", "tool_calls of another form")
    return calls if isinstance(calls, list) else [calls]


def _refuse(message: str, kind: str) -> NoReturn:
    raise RecordError(message, kind)
