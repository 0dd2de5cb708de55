"""Records: chats in JSONL, one `{"messages": [{"role": ..., "content": ...}, ...]}` a line.

What a record says is used or refused by name, never dropped: `tools`, `documents` and `chat_template_kwargs`
reach the chat template, as do `tool_calls`, `reasoning_content` and any other key of a message; `weight` must
agree with what is learnt: the last reply, or all replies but those of weight 0 (`Learn`). Text in parts is
joined. `source` names where a record comes from. Other keys of a line (an id, a language) say nothing about
the conversation and are not read; those that do, under names of other trainers, are refused.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import unicodedata
from collections.abc import Mapping
from typing import Any, NoReturn

from tide_megatron.base.errors import ConfigError, RecordError, nearest
from tide_megatron.base.read import doubled_key, is_text
from tide_megatron.text.templates import REASONING, Inputs

ROLES = ("system", "developer", "user", "assistant", "tool")
_INSTEAD = {
    "system": "make it the first message",
    "functions": "write them as tools",
    "function_call": "write it as tool_calls",
    "enable_thinking": 'write it as "chat_template_kwargs": {"enable_thinking": ...}',
    "chat_template": "put one template into the tokenizer's folder",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is learnt"),
}
"""Keys that would change what a conversation says -> what to do."""
_IN_MESSAGES = {name: _INSTEAD[name] for name in _INSTEAD if name not in ("system", "functions")} | {
    "refusal": "write it as content",
    "prefix": "end the messages with a whole reply",
}
_OTHER_FORMATS = ("conversations", "conversation", "prompt", "instruction")
_WEIGHTS = ("weight", "train", "training", "loss", "loss_weight")
"""Names under which trainers say whether a message is learnt."""
_TOO_DEEP = "not JSON that can be read (nested too deep): flatten it"
MEANINGFUL = ("tools", "documents", "chat_template_kwargs", "source", *_WEIGHTS, *_INSTEAD)
"""Keys beside `messages` that are used, or refused where they say something."""


class Learn(str, enum.Enum):
    """Which replies of a conversation are learnt; the last always is."""

    LAST = "last"
    ALL = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How lines become records."""

    normalize: bool = False
    """Put all text into NFC."""
    learn: Learn = Learn.LAST

    @classmethod
    def of(cls, *, normalize: bool, learn: str) -> Reading:
        """Check the options.

        Raises:
            ConfigError: an unknown word.
        """
        words = [word.value for word in Learn]
        if learn not in words:
            raise ConfigError(f"learn: {learn!r} is unknown: {nearest(learn, words)}")
        return cls(normalize=normalize, learn=Learn(learn))


_AS_IT_STANDS = Reading()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRecord:
    """One conversation; its last message is the assistant's reply."""

    messages: tuple[dict[str, Any], ...]
    """Each has a role; content is text where there is any."""
    learnt: tuple[int, ...]
    """Which messages are replies to learn, by index, ascending; the last message is one, the first is not."""
    inputs: Inputs = dataclasses.field(default_factory=Inputs)
    """What its chat template is given beside them."""
    source: str | None = None
    """Where it comes from, by its own words."""


def parse_record(line: bytes, reading: Reading = _AS_IT_STANDS) -> ChatRecord:
    """Turn one line of JSON into a record.

    Raises:
        RecordError: it is no conversation that ends with a reply, or says what would be dropped.
    """
    try:
        content = load_row(line)
        return _record(_in_nfc(content) if reading.normalize else content, reading.learn)
    except RecursionError:
        _refuse(_TOO_DEEP, "nested too deep")


def _record(content: Any, learn: Learn) -> ChatRecord:
    """Turn a line's JSON into a record."""
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not messages:
        keys = content if isinstance(content, dict) else {}
        other = next((name for name in _OTHER_FORMATS if keys.get(name)), "")
        hint = " (an array: write one object a line, as by jq -c .[])" * isinstance(content, list)
        hint += f"; this one has {other!r}: rewrite it" * bool(other)
        _refuse(
            f'no messages: a record is {{"messages": [{{"role": ..., "content": ...}}, ...]}}{hint}',
            "no messages",
        )
    checked = tuple(_message(message, f"message {index}") for index, message in enumerate(messages, 1))
    last = checked[-1]["role"]
    if last != "assistant":
        _refuse(f"no reply: the last message must be the assistant's, it is the {last}'s", "no reply")
    if len(checked) == 1:
        _refuse("a reply without a request: put a user message before it", "no request")
    learnt = _learnt(messages, learn)
    opening = checked[0].get("content") if checked[0]["role"] == "system" else None
    _check_keys(content, _INSTEAD, "", {"system": opening})
    _check_weight({"weight": content.get("weight")}, "the record", is_learnt=True)
    return ChatRecord(
        messages=checked, learnt=learnt, inputs=_inputs(content), source=_source(content.get("source"))
    )


def load_row(line: bytes) -> Any:
    """Read a line's JSON, in which every key stands once.

    Raises:
        RecordError: it is none, or no text.
    """
    try:
        text = line.decode("utf-8-sig")
        if text.startswith("\ufeff"):
            json.loads(text)  # raises: a second byte order mark is no JSON
        content = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        _refuse(f"not UTF-8 ({error.reason}): convert the file to UTF-8", "not UTF-8")
    except ValueError as error:
        _refuse(f"not JSON ({error}): write one JSON object per line", "not JSON")
    except RecursionError:
        _refuse(_TOO_DEEP, "nested too deep")
    if "\\ud" in text or "\\uD" in text:
        _check_characters(content)
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse(f"the key {doubled_key(pairs)!r} stands twice in one object: remove one", "a doubled key")
    return found


def _no_number(word: str) -> NoReturn:
    _refuse(f"not JSON ({word} is no JSON number): write null or a number", "not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)


def _check_characters(content: Any) -> None:
    """Refuse halves of characters, which no text can hold."""
    if not is_text(content):
        _refuse("content holds half of a surrogate pair: write the character whole", "half a character")


def _message(message: Any, place: str) -> dict[str, Any]:
    """Return one message as a chat template may see it, or say what is wrong with it."""
    if not isinstance(message, dict):
        _refuse(f"{place}: must be an object with role and content", "a message that is no object")
    role = message.get("role")
    if role not in ROLES:
        hint = "write it as role tool" if role == "function" else nearest(str(role), ROLES)
        _refuse(f"{place}: unknown role {role!r}: {hint}", "unknown role")
    _check_keys(message, _IN_MESSAGES, f"{place}: ", {})
    kept = {
        key: value
        for key, value in message.items()
        if value is not None and key not in (*_WEIGHTS, *_IN_MESSAGES)
    }
    text = _text(message.get("content"), place, role)
    kept |= {"content": text} if "content" in kept else {}
    if (thought := _thought(message, place)) is not None:
        kept["reasoning_content"] = thought
    if message.get("tool_calls") is not None:
        kept["tool_calls"] = _calls(message["tool_calls"], place)
    for key in ("reasoning_content", "tool_calls"):
        if kept.get(key) and role != "assistant":
            _refuse(f"{place}: {key} of the {role}: only the assistant has it", f"{key} of the {role}")
    if not kept.get("tool_calls"):
        kept.pop("tool_calls", None)
        if role != "tool" and not text.strip():
            _refuse(
                f"{place}: the {role}'s content is empty: fill it or remove the record",
                f"the {role}'s content is empty",
            )
    return kept


def _text(content: Any, place: str, role: str) -> str:
    """Return a message's text; parts are joined as they stand, with nothing between."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse(
            f"{place}: the {role}'s content is {_kind(content)}: write text, or a list of parts with text",
            "content that is no text",
        )
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(part, dict) and kind not in ("text", "input_text", "output_text"):
            _refuse(
                f"{place}: the {role}'s content has a part of type {kind!r}: only text is learnt, "
                "remove the record",
                f"a part of type {kind!r}",
            )
        if not isinstance(text, str):
            _refuse(f"{place}: the {role}'s content has a part without text: fill it", "a part without text")
        texts.append(text)
    return "".join(texts)


def _thought(message: Mapping[str, Any], place: str) -> str | None:
    """Return the reasoning before a reply, which has several names."""
    said = {name: message[name] for name in REASONING if message.get(name) not in (None, "")}
    for name, value in said.items():
        if not isinstance(value, str):
            _refuse(f"{place}: {name} is {_kind(value)}: write text", "reasoning that is no text")
    if len(set(said.values())) > 1:
        _refuse(f"{place}: {' and '.join(said)} differ: keep one", "two kinds of reasoning")
    return next(iter(said.values()), None)


def _calls(calls: Any, place: str) -> list[Any]:
    """Check the form of tool calls: `{"function": {"name": ..., "arguments": ...}}`, or without the shell."""
    entries = calls if isinstance(calls, list) else [None]
    for call in entries:
        inside = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inside, dict) or not isinstance(inside.get("name"), str):
            _refuse(
                f'{place}: tool_calls must be [{{"function": {{"name": ..., "arguments": {{...}}}}}}, ...]',
                "tool_calls of another form",
            )
        if not isinstance(inside.get("arguments"), dict | str | None):
            _refuse(f"{place}: arguments of a tool call must be an object", "tool_calls of another form")
    return entries


def _learnt(messages: list[Any], learn: Learn) -> tuple[int, ...]:
    """Return which messages are learnt, or refuse weights that ask for something else.

    Where all replies are learnt, weight 0 leaves one out; the last is what a record is for.
    """
    last = len(messages) - 1
    chosen = [last]
    if learn is Learn.ALL:
        replies = [number for number in range(last) if messages[number]["role"] == "assistant"]
        chosen = [number for number in replies if not _is_left_out(messages[number])] + chosen
        if chosen[0] == 0:
            _refuse(
                "message 1: a reply without a request: put a user message before it, or give it weight 0",
                "no request",
            )
    for number, message in enumerate(messages):
        _check_weight(message, f"message {number + 1}", is_learnt=number in chosen, learn=learn)
    return tuple(chosen)


def _is_left_out(message: Mapping[str, Any]) -> bool:
    """Say whether a message asks not to be learnt; one that says two things is refused later."""
    return any(value is not None and value == 0 for value in map(message.get, _WEIGHTS))


def _check_weight(
    holder: Mapping[str, Any], place: str, *, is_learnt: bool, learn: Learn = Learn.LAST
) -> None:
    """Refuse a weight that contradicts what is learnt."""
    if holder.keys().isdisjoint(_WEIGHTS):
        return
    for name in _WEIGHTS:
        value = holder.get(name)
        if value is None or (value in (int(is_learnt),) and isinstance(value, int | float)):
            continue
        if isinstance(value, int | float) and value in (0, 1):
            remedy = (
                "leave the record out, or end it with the reply to learn"
                if is_learnt
                else "only the last reply is learnt: make it a record that ends there, "
                "or learn all (--learn all)"
                if learn is Learn.LAST
                else "only replies are learnt, and it is none, or says two things: take the weight out"
            )
            _refuse(
                f"{place}: {name} {json.dumps(value)}: {remedy}", f"{name} that contradicts what is learnt"
            )
        _refuse(f"{place}: {name} is {value!r}: only 0 and 1 are known", f"unknown {name}")


def _check_keys(
    holder: Mapping[str, Any], instead: Mapping[str, str], place: str, same: Mapping[str, Any]
) -> None:
    """Refuse keys that would be dropped though they mean something.

    Args:
        holder: a record or a message.
        instead: keys, and what to do about each.
        place: start of the message.
        same: values that say nothing new.
    """
    if instead.keys().isdisjoint(holder):
        return
    for name, remedy in instead.items():
        value = holder.get(name)
        if value not in (None, "", [], {}, False) and value != same.get(name):
            _refuse(f"{place}{name} is not read here: {remedy}", f"{name}, which is not read")


def _inputs(content: Mapping[str, Any]) -> Inputs:
    """Return what the template is given beside the messages."""
    found: dict[str, Any] = {}
    for name in ("tools", "documents"):
        value = content.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)  # a column of text, as tables have it
            except (ValueError, RecursionError):
                _refuse(f"{name}: text that is no JSON: write a list of objects", f"{name} of another form")
        if value is not None and value != "":
            if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
                _refuse(f"{name}: must be a list of objects, not {_kind(value)}", f"{name} of another form")
            found[name] = value
    options = content.get("chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        _refuse(f"chat_template_kwargs: must be an object, not {_kind(options)}", "options of another form")
    return Inputs(**found, chat_template_kwargs=options or {})


def _source(value: Any) -> str | None:
    """Return a source's name; what is no name is written as JSON."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _in_nfc(value: Any) -> Any:
    """Return a JSON value with all text in NFC."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [_in_nfc(entry) for entry in value]
    if isinstance(value, dict):
        return {_in_nfc(key): _in_nfc(entry) for key, entry in value.items()}
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "text" if isinstance(value, str) else "null")


def _refuse(message: str, kind: str) -> NoReturn:
    raise RecordError(message, kind)
