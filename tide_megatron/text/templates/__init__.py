"""Chat templates: those of this package, those that come with a tokenizer, and what they make of messages.

A chat template is a Jinja program. It runs in a sandbox with the messages, `add_generation_prompt`, the
tokenizer's special tokens and extra variables (`enable_thinking=False`), and with nothing that changes from
day to day: no clock, so that equal records give equal ids. (The renderer of `transformers` has a clock that
cannot be taken out, and finds a message only where the template marks it.)

`ChatTemplate.contents` finds where each message's content stands in the rendered text without searching for
it. The template is rendered once more with a marker in the place of every content. What stands between the
markers is the skeleton; the contents, as they are or with their ends stripped, must fill it to the very text
that the template really wrote. So a message that repeats another, or a word of the template, cannot be found
in the wrong place (the reference searches decoded text, spec section 4.1), and a template that loses, changes
or repeats a message is refused.

The package's own templates are for tokenizers without one (tiktoken, SentencePiece) and for models whose
template was changed. They are written from what the models are trained on (spec section 5): `qwen3` (thinking
off), `llada2`, `chatml` (WeDLM).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from tide_megatron.base.errors import DataError, nearest
from tide_megatron.text.backends.files import CONFIG_FILE

TEMPLATE_FILE = "chat_template.jinja"
Message = Mapping[str, str]
"""`{"role": ..., "content": ...}`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """The place of one message's content in the rendered text, in bytes of UTF-8."""

    start: int
    end: int
    skipped: int
    """Bytes of the original content that the template stripped from its front: byte b of the text is byte
    `skipped + b - start` of the content."""


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

    def contents(self, messages: Sequence[Message], whole: str) -> list[Content]:
        """Find every message's content in `whole`, the rendered `messages` without a generation prompt.

        Raises:
            DataError: the template loses, repeats or changes a message; says which.
        """
        pieces = self._skeleton(messages, whole)
        # For each message: places where it may start, each with the (place, shown, skipped) that led there.
        paths: list[dict[int, tuple[int, str, int]]] = []
        places = {len(pieces[0])} if whole.startswith(pieces[0]) else set()
        for message, piece in zip(messages, pieces[1:], strict=True):
            reached: dict[int, tuple[int, str, int]] = {}
            for place in places:
                for shown, skipped in _shown_forms(message["content"]):
                    if whole.startswith(shown, place) and whole.startswith(piece, place + len(shown)):
                        reached.setdefault(place + len(shown) + len(piece), (place, shown, skipped))
            if not reached:
                break
            paths.append(reached)
            places = set(reached)
        if len(paths) < len(messages) or len(whole) not in places:
            number = min(len(paths), len(messages) - 1)
            raise DataError(
                f"the chat template ({self.origin}) loses or changes message {number + 1} "
                f"({messages[number]['role']}): {_short(messages[number]['content'])}"
            )
        return _walk_back(paths, whole)

    def _skeleton(self, messages: Sequence[Message], whole: str) -> list[str]:
        """Return the template text around the contents: one piece more than messages."""
        mark = "\ue000"
        while mark in whole:
            mark += "\ue000"
        marks = [f"{mark}{number}\ue001" for number in range(len(messages))]
        marked = [{**message, "content": own} for message, own in zip(messages, marks, strict=True)]
        rest = self.render(marked, add_generation_prompt=False)
        pieces: list[str] = []
        for number, own in enumerate(marks):
            if rest.count(own) != 1:
                verb = "repeats or reorders" if own in rest or own in "".join(pieces) else "loses"
                raise DataError(
                    f"the chat template ({self.origin}) {verb} message {number + 1} "
                    f"({messages[number]['role']}): use a template that shows every message once"
                )
            piece, rest = rest.split(own)
            pieces.append(piece)
        return [*pieces, rest]


def template_names() -> list[str]:
    """Return the names of the package's templates."""
    files = importlib.resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja"))


def packaged_template(name: str) -> tuple[str, str]:
    """Return source and origin of a template of this package.

    Raises:
        DataError: there is none of this name.
    """
    if name not in template_names():
        raise DataError(f"template: {name!r} is unknown: {nearest(name, template_names())}")
    file = importlib.resources.files(__name__) / f"{name}.jinja"
    return file.read_text(encoding="utf-8"), f"template {name}"


def find_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return source and origin of a tokenizer's own template: the file, else the configuration's.

    Args:
        folder: where the tokenizer is.
        config: content of its `tokenizer_config.json`; of several templates the one named default counts,
            and the name of one of the package's stands for it.

    Raises:
        DataError: the configuration's is no text.
    """
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8"), str(file)
    source, origin = config.get("chat_template"), str(folder / CONFIG_FILE)
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(f"{origin}: chat_template must be text, or a list with an entry named default")
    return packaged_template(source) if source in template_names() else (source, origin)


def _refuse(message: str) -> NoReturn:
    """Stand behind `raise_exception(...)` in templates."""
    raise DataError(f"the chat template refuses these messages: {message}")


def _shown_forms(content: str) -> Iterator[tuple[str, int]]:
    """Yield what a template may show of a content, the longest first, with the bytes cut at its front."""
    for strip_front in ("", "\n", None):
        front = content.lstrip(strip_front) if strip_front != "" else content
        for strip_back in ("", "\n", None):
            shown = front.rstrip(strip_back) if strip_back != "" else front
            yield shown, len(content[: len(content) - len(front)].encode())


def _walk_back(paths: Sequence[Mapping[int, tuple[int, str, int]]], whole: str) -> list[Content]:
    """Follow the places from the end of the text to its start."""
    found = []
    place = len(whole)
    for reached in reversed(paths):
        start, shown, skipped = reached[place]
        place = start
        found.append((start, shown, skipped))
    contents, characters, offset = [], 0, 0
    for start, shown, skipped in reversed(found):  # count the bytes of every stretch once
        offset += len(whole[characters:start].encode())
        end = offset + len(shown.encode())
        contents.append(Content(start=offset, end=end, skipped=skipped))
        characters, offset = start + len(shown), end
    return contents


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
