"""Chats as token ids: render the template, split prompt and reply, count bytes (spec section 4.1).

The prompt is what a model sees when it is asked: the template over all messages but the last, with the
generation prompt. Everything after it, the end-of-turn token included, is the reply and may be masked. The
reference searches decoded text for contents; here the boundary is the end of the rendered prompt, which
cannot be found in a wrong place.

Only the last assistant message is learnt, as in the reference. `Encoded.replies` is a list, so that several
turns (and the spans of alignment) have their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tide_megatron.base.errors import DataError
from tide_megatron.text.spelling import SpellingError
from tide_megatron.text.templates import Content, Message
from tide_megatron.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One conversation in tokens."""

    ids: list[int]
    replies: list[int]
    """Half-open ranges of `ids` that may be masked, ascending and disjoint, flat: start, end, start, ..."""
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
    contents = tokenizer.chat.contents(messages, whole)
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
            "the text contains the mask token, which only the noise may write: remove it from the record"
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


def labels_of(ids: Sequence[int], replies: Sequence[int], ignored: int) -> list[int]:
    """Return `ids` inside the reply ranges (flat: start, end, start, ...) and `ignored` elsewhere."""
    labels = [ignored] * len(ids)
    for start, end in zip(replies[::2], replies[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels
