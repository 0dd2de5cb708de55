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

from tide_megatron.base.errors import DataError, RecordError
from tide_megatron.text.spelling import SpellingError
from tide_megatron.text.templates import ChatTemplate, Content, Inputs, Message, template_names
from tide_megatron.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One conversation in tokens."""

    ids: list[int]
    replies: list[int]
    """Half-open ranges of `ids` that may be masked, ascending and disjoint, flat: start, end, start, ..."""
    reply_bytes: int
    """UTF-8 bytes of the reply's text within `ids` (what NLL per byte divides by): its content, its reasoning
    and its tool calls as they are rendered; other template text is not counted."""
    ends: list[int] = dataclasses.field(default_factory=list)
    """Byte of the rendered text behind each token, never descending; empty unless asked for."""
    contents: list[Content] = dataclasses.field(default_factory=list)
    """Place of each text in the rendered text, by message and in each its reasoning before its content; empty
    unless asked for."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first reply."""
        return self.replies[0]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    inputs: Inputs | None = None,
    max_tokens: int | None = None,
    aligned: bool = False,
) -> Encoded:
    """Encode a conversation whose last message is the reply to learn.

    Args:
        tokenizer: must have a chat template.
        messages: at least one message before the reply; see `data.record` for what a record may be.
        inputs: what the template is given beside them; None: nothing.
        max_tokens: cut here; None: keep all. A prompt that leaves no room for the reply is the
            caller's to refuse.
        aligned: also give `ends` and `contents`, which alignment with another tokenizer stands on.

    Raises:
        DataError: no template, or one that does not parse.
        RecordError: a template that fails or loses something, text that holds the mask token, or tokens whose
            bytes do not spell the text. The message does not know the file and line; the caller puts them in
            front.
    """
    inputs = inputs or Inputs()
    prompt, whole = _render(tokenizer, messages, inputs)
    assert tokenizer.chat is not None, "rendering needs a template and ran"
    contents, tail = tokenizer.chat.pieces(messages, whole, inputs)
    _check_shown(messages, contents)
    ids, prompt_ids = tokenizer.encode(whole), tokenizer.encode(prompt)
    start = len(prompt_ids)
    if ids[:start] != prompt_ids:
        # The tokenizer merges across the boundary. Generation starts from the prompt's own ids, and so
        # does training.
        ids = prompt_ids + tokenizer.encode(whole[len(prompt) :], opening=False)
    if tokenizer.mask_id in ids:
        raise RecordError(
            "the text contains the mask token, which only the noise may write: remove it from the record",
            "text with the mask token",
        )
    try:
        ends = tokenizer.ends(ids, whole)
    except SpellingError as error:
        raise RecordError(
            f"{_place_of(error.place, messages, contents)}: {error}", "text that the tokenizer changes"
        ) from None
    end = min(len(ids), max_tokens or len(ids))
    learnt = [(content.start, content.end) for content in contents if content.message == len(messages) - 1]
    if messages[-1].get("tool_calls"):
        first = max([len(prompt.encode()), *(content.end for content in contents)])
        learnt.append((first, len(whole.encode()) - _closing_bytes(tokenizer.chat, messages, inputs, tail)))
    return Encoded(
        ids=ids[:end],
        replies=[min(start, end), end],
        reply_bytes=sum(max(0, min(ends[end - 1], last) - first) for first, last in learnt),
        ends=ends[:end] if aligned else [],
        contents=contents if aligned else [],
    )


def _check_shown(messages: Sequence[Message], contents: Sequence[Content]) -> None:
    """Refuse messages of which nothing is shown; what calls tools, or what a tool says, may be empty."""
    shown = {
        content.message for content in contents if content.key == "content" and content.end > content.start
    }
    for number, message in enumerate(messages):
        if number not in shown and message["role"] != "tool" and not message.get("tool_calls"):
            raise RecordError(
                f"message {number + 1} ({message['role']}) has nothing to show: fill it or remove the record",
                f"the {message['role']}'s content is empty",
            )


def _closing_bytes(chat: ChatTemplate, messages: Sequence[Message], inputs: Inputs, tail: str) -> int:
    """Count the bytes of template text that closes a reply which ends in tool calls.

    Args:
        chat: the template.
        messages: the conversation.
        inputs: as for `encode_chat`.
        tail: what was rendered behind the last text, the calls among it.
    """
    silent = {key: value for key, value in messages[-1].items() if key != "tool_calls"}
    silent.setdefault("content", "")
    try:
        without = chat.render([*messages[:-1], silent], add_generation_prompt=False, inputs=inputs)
    except RecordError:  # it does not show such a reply, so nobody can tell what closes it
        return 0
    pairs = zip(reversed(tail), reversed(without), strict=False)
    same = next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(tail), len(without)))
    return len(tail[len(tail) - same :].encode())


def _place_of(place: int, messages: Sequence[Message], contents: Sequence[Content]) -> str:
    """Name the message that holds byte `place` of the rendering, or lies behind it."""
    if not contents:
        return "template text"
    content = contents[sum(content.end <= place for content in contents[:-1])]
    where = "" if content.start <= place < content.end else "template text before "
    return f"{where}message {content.message + 1} ({messages[content.message]['role']})"


def _render(tokenizer: Tokenizer, messages: Sequence[Message], inputs: Inputs) -> tuple[str, str]:
    """Return the prompt of the last message, and the whole conversation."""
    if tokenizer.chat is None:
        raise DataError(
            f"{tokenizer.name} has no chat template: add chat_template.jinja beside it, or name one "
            f"of this package (template=...: {', '.join(template_names())})"
        )
    tokenizer.chat.check(messages, inputs)
    prompt = tokenizer.chat.render(messages[:-1], add_generation_prompt=True, inputs=inputs)
    whole = tokenizer.chat.render(messages, add_generation_prompt=False, inputs=inputs)
    if not whole.startswith(prompt):
        thinks = "reasoning_content" in messages[-1]
        raise RecordError(
            f"the chat template ({tokenizer.chat.origin}) renders the prompt differently once the reply is "
            "there, so the two cannot be told apart: use a template whose generation prompt opens its replies"
            + ", or give the option enable_thinking=true"
            * thinks,
            "the template's prompt does not open the reply",
        )
    return prompt, whole


def labels_of(ids: Sequence[int], replies: Sequence[int], ignored: int) -> list[int]:
    """Return `ids` inside the reply ranges (flat: start, end, start, ...) and `ignored` elsewhere."""
    labels = [ignored] * len(ids)
    for start, end in zip(replies[::2], replies[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels
