"""Chats as token ids: render the template, split prompt and reply, count bytes (spec section 4.1).

A chat template is a Jinja program that comes with a tokenizer. It runs in a sandbox with the messages,
`add_generation_prompt`, the tokenizer's special tokens and extra variables (`enable_thinking=False`), and
with nothing that changes from day to day: no clock, so that equal records give equal ids.

The prompt is what a model sees when it is asked: the template over all messages but the last, with the
generation prompt. Everything after it, the end-of-turn token included, is the reply and may be hidden. The
reference searches decoded text for contents; here the boundary is the end of the rendered prompt, which
cannot be found in a wrong place.

Only the last assistant message is learnt, as in the reference. `Encoded.replies` is a list, so that several
turns (and the spans of alignment) have their place.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from tide_megatron.base.errors import DataError
from tide_megatron.text.skeleton import Content, find_contents
from tide_megatron.text.spelling import SpellingError

if TYPE_CHECKING:
    from tide_megatron.text.tokenizer import Tokenizer

Message = Mapping[str, str]
"""`{"role": ..., "content": ...}`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """One chat template with the variables it is rendered with."""

    source: str
    origin: str
    """The file it came from, for messages."""
    variables: Mapping[str, object]
    special_tokens: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Name template and variables by content (sha256, hexadecimal)."""
        content = json.dumps([self.source, dict(self.variables), dict(self.special_tokens)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def _program(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        # Templates expect plain JSON; Jinja's own filter escapes for web pages.
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise DataError(f"{self.origin}: the chat template does not parse: {error}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return the text of `messages`, with the opening of a reply behind it when asked.

        Raises:
            DataError: the template is broken or refuses these messages.
        """
        values = {**self.special_tokens, **self.variables}
        try:
            return self._program.render(
                values, messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt
            )
        except DataError:
            raise
        except Exception as error:  # a template is foreign code: whatever it raises is about this record
            raise DataError(f"the chat template ({self.origin}) fails on these messages: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One conversation in tokens."""

    ids: list[int]
    replies: list[int]
    """Half-open ranges of `ids` that may be hidden, ascending and disjoint, flat: start, end, start, ..."""
    reply_bytes: int
    """UTF-8 bytes of the reply's text within `ids` (what NLL per byte divides by); template text is not
    counted."""
    ends: list[int] = dataclasses.field(default_factory=list)
    """Byte of the rendered text behind each token, never descending; empty unless asked for."""
    contents: list[Content] = dataclasses.field(default_factory=list)
    """Place of each message's content in the rendered text; empty unless asked for."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first reply."""
        return self.replies[0]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    max_tokens: int | None = None,
    aligned: bool = False,
) -> Encoded:
    """Encode a conversation whose last message is the reply to learn.

    Args:
        tokenizer: must have a chat template.
        messages: at least one message before the reply; see `data.record` for what a record may be.
        max_tokens: cut here; None: keep all. A prompt that leaves no room for the reply is the
            caller's to refuse.
        aligned: also give `ends` and `contents`, which alignment with another tokenizer stands on.

    Raises:
        DataError: no template, a template that fails or loses text, text that holds the mask token, or tokens
            whose bytes do not spell the text. The message does not know the file and line; the caller puts
            them in front.
    """
    prompt, whole = _render(tokenizer, messages)
    assert tokenizer.chat is not None, "rendering needs a template and ran"
    contents = find_contents(tokenizer.chat, messages, whole)
    for number, content in enumerate(contents):
        if content.start == content.end:
            raise DataError(
                f"message {number + 1} ({messages[number]['role']}) has nothing to show: "
                "fill it or remove the record"
            )
    ids, prompt_ids = tokenizer.encode(whole), tokenizer.encode(prompt)
    start = len(prompt_ids)
    if ids[:start] != prompt_ids:
        # The tokenizer merges across the boundary. Generation starts from the prompt's own ids, and so
        # does training.
        ids = prompt_ids + tokenizer.encode(whole[len(prompt) :], opening=False)
    if tokenizer.mask_id in ids:
        raise DataError(
            "the text contains the mask token, which only hiding may write: remove it from the record"
        )
    try:
        ends = tokenizer.ends(ids, whole)
    except SpellingError as error:
        raise DataError(f"{_named(error.place, messages, contents)}: {error}") from None
    end = min(len(ids), max_tokens or len(ids))
    covered = min(ends[end - 1], contents[-1].end) - contents[-1].start
    return Encoded(
        ids=ids[:end],
        replies=[min(start, end), end],
        reply_bytes=max(0, covered),
        ends=ends[:end] if aligned else [],
        contents=contents if aligned else [],
    )


def _named(place: int, messages: Sequence[Message], contents: Sequence[Content]) -> str:
    """Name the message that holds byte `place` of the rendering, or lies behind it."""
    number = sum(content.end <= place for content in contents[:-1])
    where = "" if contents[number].start <= place < contents[number].end else "template text before "
    return f"{where}message {number + 1} ({messages[number]['role']})"


def _render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, str]:
    """Return the prompt of the last message, and the whole conversation."""
    if tokenizer.chat is None:
        raise DataError(
            f"{tokenizer.name} has no chat template: add chat_template.jinja beside it, or name one "
            "of this package (template=...)"
        )
    prompt = tokenizer.chat.render(messages[:-1], add_generation_prompt=True)
    whole = tokenizer.chat.render(messages, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"the chat template ({tokenizer.chat.origin}) renders the prompt differently once the reply is "
            "there, so the two cannot be told apart: use a template whose generation prompt opens its replies"
        )
    return prompt, whole


def _refuse(message: str) -> NoReturn:
    """Stand behind `raise_exception(...)` in templates."""
    raise DataError(f"the chat template refuses these messages: {message}")


def labels_of(ids: Sequence[int], replies: Sequence[int], ignored: int) -> list[int]:
    """Return `ids` inside the reply ranges (flat: start, end, start, ...) and `ignored` elsewhere."""
    labels = [ignored] * len(ids)
    for start, end in zip(replies[::2], replies[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels
