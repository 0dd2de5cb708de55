"""Chat templates: those of this package, those that come with a tokenizer, and what they make of messages.

`text/rendering.py` says what a template sees. `ChatTemplate.pieces` finds where each text of a conversation
(a message's content, the reasoning before it) stands in what was rendered, without searching for it. The
template is rendered once more with a marker in the place of every text. What stands between the markers is
the skeleton; the texts, as they are or with their ends stripped, must fill it to the very text that the
template really wrote. So a message that repeats another, or a word of the template, cannot be found in the
wrong place (the reference searches decoded text, spec section 4.1), and a template that loses, changes or
repeats a message is refused. Two things may be left out: reasoning of earlier turns, which many templates do
not show again, and nothing else.

The package's own templates are for tokenizers without one (tiktoken, SentencePiece) and for models whose
template was changed. They are written from what the models are trained on (spec section 5): `qwen3` (thinking
off), `llada2`, `chatml` (WeDLM). They know no tools.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import ConfigError, DataError, RecordError, nearest
from tide_megatron.text import rendering
from tide_megatron.text.backends.files import CONFIG_FILE, read_text
from tide_megatron.text.templates.places import MARK, Content, behind, fill, mark_for

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
TOOLS = "tool_use"
"""The template that is used when a conversation has tools, where a folder has one of this name."""
PLAIN_ROLES = ("system", "user", "assistant")
TEXTS = ("reasoning_content", "content")
"""Keys of a message that hold text, in the order in which templates show them."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the reasoning before a reply; templates read the first (gpt-oss the second)."""
_BARE_KEYS = {"role", "content"}
_PLAIN_KEYS = {"role", *TEXTS}
_MOST_SHAPES = 4096
"""Most kinds of conversations that are remembered."""
Shape = tuple[tuple[Any, ...], ...]
"""Of each message its role, and whether each of its `TEXTS` is there, and filled."""
Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`, and on assistant messages `reasoning_content` and `tool_calls`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a template is given beside the messages."""

    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None
    chat_template_kwargs: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Options of this conversation alone; they go before the tokenizer's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """One chat template with the variables it is rendered with."""

    source: str
    origin: str
    """The file it came from, for messages."""
    variables: Mapping[str, object]
    special_tokens: Mapping[str, str]
    tool_source: str | None = None
    """The folder's template for conversations with tools; None: the same one. (Not in the digest: data
    without tools is the same with or without it.)"""

    @property
    def digest(self) -> str:
        """Name template and variables by content (sha256, hexadecimal)."""
        content = json.dumps([self.source, dict(self.variables), dict(self.special_tokens)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, inputs: Inputs | None = None
    ) -> str:
        """Return the text of `messages`, with the opening of a reply behind it when asked.

        Raises:
            DataError: the template is broken.
            RecordError: it refuses these messages.
        """
        inputs = inputs or Inputs()
        values = {
            **(self._with(inputs.chat_template_kwargs) if inputs.chat_template_kwargs else self._fixed),
            "messages": [_as_seen(message) for message in messages],
            "tools": inputs.tools,
            "documents": inputs.documents,
            "add_generation_prompt": add_generation_prompt,
        }
        return rendering.render(self._source_for(inputs), self.origin, values)

    def _with(self, options: Mapping[str, object]) -> dict[str, object]:
        """Return the variables of a conversation with options of its own."""
        chosen = {**self.variables, **options}
        return {**self.special_tokens, **{name: value for name, value in chosen.items() if value is not None}}

    @functools.cached_property
    def _fixed(self) -> dict[str, object]:
        """Variables of a conversation without options of its own."""
        return self._with({})

    def check(self, messages: Sequence[Message], inputs: Inputs) -> None:
        """Refuse a conversation of which the template would drop something.

        Raises:
            RecordError: says what it never shows.
        """
        shape = _shape(messages, inputs)
        if shape in self._checked:
            return
        source = self._source_for(inputs)
        known = rendering.names_in(source, self.origin)
        try:
            rendering.check_options(inputs.chat_template_kwargs, known, self.origin)
        except ConfigError as error:
            raise RecordError(str(error), "chat_template_kwargs that the template does not read") from None
        dropped = [name for name in ("tools", "documents") if getattr(inputs, name) and name not in known]
        used = {key for message in messages for key, value in message.items() if value}
        dropped += ["tool_calls"] if "tool_calls" in used and "tool_calls" not in source else []
        if "reasoning_content" in used and not any(name in source for name in REASONING):
            dropped.append("reasoning_content")
        if source in _plain_sources():
            dropped += [f"role {m['role']}" for m in messages if m["role"] not in PLAIN_ROLES]
        if dropped:
            raise RecordError(
                f"the chat template ({self.origin}) does not show {dropped[0]}: use a template that does, or "
                "take it out of the record if nothing is to be learnt from it",
                f"{dropped[0]} that the template does not show",
            )
        if "tool_calls" in used:
            self._check_calls(messages, inputs)
        if shape is not None and len(self._checked) < _MOST_SHAPES:
            self._checked.add(shape)

    def pieces(
        self, messages: Sequence[Message], whole: str, inputs: Inputs | None = None
    ) -> tuple[list[Content], str]:
        """Find every text in `whole`, the rendered `messages` without a generation prompt.

        Returns:
            Their places in order, and the template text behind the last one.

        Raises:
            RecordError: the template loses, repeats or changes a message; says which.
        """
        texts = [
            (number, key) for number, message in enumerate(messages) for key in TEXTS if message.get(key)
        ]
        between = self._between(messages, texts, whole, inputs)
        contents = fill(between, texts, messages, whole)
        if isinstance(contents, int):
            number, key = texts[min(contents, len(texts) - 1)] if texts else (0, "content")
            text = str(messages[number].get(key, ""))
            raise RecordError(
                f"the chat template ({self.origin}) loses or changes {_named(messages, number, key)}: "
                f"{_short(text)}" + _hint(text, key),
                "the template changes a message",
            )
        return contents, [piece for piece in between if piece is not None][-1]

    def _between(
        self,
        messages: Sequence[Message],
        texts: Sequence[tuple[int, str]],
        whole: str,
        inputs: Inputs | None,
    ) -> Sequence[str | None]:
        """Return `_skeleton`, which conversations of plain messages share with those of the same shape.

        Nothing else can enter it: all that differs between them are texts, and the marks stand for these.
        """
        shape = _shape(messages, inputs)
        if shape is None or MARK in whole:
            return self._skeleton(messages, texts, whole, inputs)
        found = self._skeletons.get(shape)
        if found is None:
            if len(self._skeletons) >= _MOST_SHAPES:
                self._skeletons.clear()
            found = self._skeletons[shape] = self._skeleton(messages, texts, whole, inputs)
        return found

    @functools.cached_property
    def _skeletons(self) -> dict[Shape, Sequence[str | None]]:
        return {}

    @functools.cached_property
    def _checked(self) -> set[Shape]:
        """Shapes of which the template drops nothing."""
        return set()

    def _source_for(self, inputs: Inputs) -> str:
        has_own = inputs.tools is not None and self.tool_source is not None
        return self.tool_source or self.source if has_own else self.source

    def _skeleton(
        self,
        messages: Sequence[Message],
        texts: Sequence[tuple[int, str]],
        whole: str,
        inputs: Inputs | None,
    ) -> list[str | None]:
        """Return the template text before the first text and behind each; None: a text is not shown."""
        mark = mark_for(whole)
        marked: list[dict[str, Any]] = [dict(message) for message in messages]
        marks = [f"{mark}{number}\ue001" for number in range(len(texts))]
        for (number, key), own in zip(texts, marks, strict=True):
            others = [name for name in REASONING if name in marked[number]] if key in REASONING else []
            marked[number] |= dict.fromkeys([key, *others], own)
        rest = self.render(marked, add_generation_prompt=False, inputs=inputs)
        between: list[str | None] = []
        shown: list[str] = []
        for (number, key), own in zip(texts, marks, strict=True):
            is_earlier_thought = key != "content" and number < len(messages) - 1
            count = rest.count(own)
            if count != 1 and not (count == 0 and is_earlier_thought and own not in "".join(shown)):
                verb = "repeats or reorders" if count or own in "".join(shown) else "loses"
                raise RecordError(
                    f"the chat template ({self.origin}) {verb} {_named(messages, number, key)}: "
                    "use a template that shows every message once",
                    f"the template {verb} a message",
                )
            if count:
                piece, rest = rest.split(own)
                shown.append(piece)
            between.append(piece if count else None)
        return behind(between, rest)

    def _check_calls(self, messages: Sequence[Message], inputs: Inputs) -> None:
        """Refuse a template that drops names or arguments of tool calls."""
        marked, wanted = [], []
        for number, message in enumerate(messages):
            calls = []
            for place, call in enumerate(message.get("tool_calls") or ()):
                mark = f"\ue000{number}.{place}"
                inside = call.get("function", call)
                arguments = inside.get("arguments")
                changed = {**inside, "name": f"{mark}n\ue001"}
                wanted.append((number, "name", changed["name"]))
                if arguments:
                    own = f"{mark}a\ue001"
                    changed["arguments"] = own if isinstance(arguments, str) else {"marked": own}
                    wanted.append((number, "arguments", own))
                calls.append({**call, "function": changed} if "function" in call else changed)
            marked.append({**message, "tool_calls": calls} if calls else message)
        found = self.render(marked, add_generation_prompt=False, inputs=inputs)
        for number, what, own in wanted:
            if own not in found and json.dumps(own)[1:-1] not in found:
                raise RecordError(
                    f"the chat template ({self.origin}) does not show the {what} of the tool_calls of "
                    f"{_named(messages, number, 'tool_calls')}: use a template that does",
                    "tool_calls that the template does not show",
                )


def template_names() -> list[str]:
    """Return the names of the package's templates."""
    files = importlib.resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja"))


def packaged_template(name: str) -> tuple[str, str, None]:
    """Return source and origin of a template of this package (which has none for tools).

    Raises:
        DataError: there is none of this name.
    """
    if name not in template_names():
        raise DataError(f"template: {name!r} is unknown: {nearest(name, template_names())}")
    file = importlib.resources.files(__name__) / f"{name}.jinja"
    return file.read_text(encoding="utf-8"), f"template {name}", None


def find_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str, str | None] | None:
    """Return source and origin of a tokenizer's own template, and its template for tools.

    As under transformers, files go before the configuration; None: there is neither.

    Args:
        folder: where the tokenizer is.
        config: content of its `tokenizer_config.json`; of several templates the one named default counts,
            and the name of one of the package's stands for it.

    Raises:
        DataError: a template is no text.
    """
    file, more = folder / TEMPLATE_FILE, sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    named: dict[str, Any] = {other.name.removesuffix(".jinja"): read_text(other) for other in more}
    if file.is_file():
        named["default"] = read_text(file)
    origin = str(file if file.is_file() else folder / CONFIG_FILE)
    if not named:
        said = config.get("chat_template")
        entries = said if isinstance(said, list) else []
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries):
            raise DataError(f"{origin}: chat_template: a list must hold objects with a name and a template")
        named = (
            said if isinstance(said, dict) else {entry["name"]: entry.get("template") for entry in entries}
        )
        named = named if isinstance(said, list | dict) else {"default": said}
    source, tools = named.get("default"), named.get(TOOLS)
    if source is None:
        return None
    if not isinstance(source, str) or not isinstance(tools, str | None):
        raise DataError(f"{origin}: chat_template must be text, or a list with an entry named default")
    if source in template_names():
        return packaged_template(source)
    return source, origin, tools


@functools.cache
def _plain_sources() -> frozenset[str]:
    """Return the package's templates that write nothing for a role they do not know."""
    return frozenset(packaged_template(name)[0] for name in ("llada2", "qwen3"))


def _shape(messages: Sequence[Message], inputs: Inputs | None) -> Shape | None:
    """Return all of a conversation but its texts; None: it says more than plain texts."""
    if inputs is not None and (inputs.tools is not None or inputs.documents is not None):
        return None
    if inputs is not None and inputs.chat_template_kwargs:
        return None
    shape = []
    for message in messages:
        if not message.keys() <= _PLAIN_KEYS:
            return None
        kinds = [value if value is None else bool(value) for value in map(message.get, TEXTS)]
        shape.append((message["role"], *kinds))
    return tuple(shape)


def _as_seen(message: Message) -> dict[str, Any]:
    """Return a message as templates see it: without keys that hold nothing, its reasoning under all names."""
    if type(message) is dict and message.keys() == _BARE_KEYS and message["content"] is not None:
        return message  # as most are: nothing to change
    seen = {key: value for key, value in message.items() if value is not None}
    thought = next((seen[name] for name in REASONING if name in seen), None)
    return seen if thought is None else {"thinking": thought, **seen, "reasoning_content": thought}


def _named(messages: Sequence[Message], number: int, key: str) -> str:
    what = "" if key in ("content", "tool_calls") else f"{key} of "
    return f"{what}message {number + 1} ({messages[number]['role']})"


def _hint(text: str, key: str) -> str:
    """Say what most often is behind a changed message."""
    is_inline = key == "content" and "</think>" in text
    return " (write the thought before </think> as reasoning_content)" * is_inline


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
