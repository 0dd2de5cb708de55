"""Chats as token ids: encode what `text/turns.py` renders, split prompt and reply, count bytes (spec 4.1).

Everything after a reply's prompt, the end-of-turn token included, is the reply and may be masked.

Which assistant messages are learnt is the caller's choice: the last alone, as in the reference, or several.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

from tide_megatron.base.errors import RecordError
from tide_megatron.text.spelling import SpellingError
from tide_megatron.text.templates import Content, Inputs, Message
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.text.turns import Rendered, Turn, refuse_earlier, render_chat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One conversation in tokens."""

    ids: list[int]
    replies: list[int]
    """Half-open ranges of `ids` that may be masked, ascending and disjoint, flat: start, end, start, ..."""
    reply_bytes: int
    """UTF-8 bytes of the replies' texts within `ids` (what NLL per byte divides by): content, reasoning and
    tool calls as they are rendered; other template text is not counted."""
    unprompted: int = 0
    """Replies among them that the template writes without their generation prompt (`text/turns.py`)."""
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
    learnt: Sequence[int] | None = None,
    max_tokens: int | None = None,
    aligned: bool = False,
) -> Encoded:
    """Encode a conversation whose last message is a reply to learn.

    Args:
        tokenizer: must have a chat template.
        messages: at least one message before the reply; see `data.record` for what a record may be.
        inputs: what the template is given beside them; None: nothing.
        learnt: which messages are replies to learn, by index, ascending, the last message among them, the
            first not; None: the last alone.
        max_tokens: cut here; None: keep all. A prompt that leaves no room for the reply is the
            caller's to refuse.
        aligned: also give `ends` and `contents`, which alignment with another tokenizer stands on.

    Raises:
        DataError: no template, or one that does not parse.
        RecordError: a template that fails or loses something, an earlier reply that cannot be learnt as it
            would be written, text that holds the mask token, or tokens whose bytes do not spell the text.
            The message does not know the file and line; the caller puts them in front.
    """
    chosen = (len(messages) - 1,) if learnt is None else learnt
    rendered = render_chat(tokenizer, messages, inputs or Inputs(), chosen)
    ids, starts = _encode_turns(tokenizer, rendered)
    if tokenizer.mask_id in ids:
        raise RecordError(
            "the text contains the mask token, which only the noise may write: remove it from the record",
            "text with the mask token",
        )
    try:
        ends = tokenizer.ends(ids, rendered.whole)
    except SpellingError as error:
        raise RecordError(
            f"{_place_of(error.place, messages, rendered.contents)}: {error}",
            "text that the tokenizer changes",
        ) from None
    limit = min(len(ids), max_tokens or len(ids))
    replies: list[int] = []
    reply_bytes = 0
    for turn, start in zip(rendered.turns, starts, strict=True):
        first, last = _range_of(turn, start, ends, messages)
        if first < limit or not replies:
            replies += [min(first, limit), min(last, limit)]
            begin = ends[first - 1] if start is None else 0
            end = ends[min(last, limit) - 1]
            reply_bytes += sum(max(0, min(end, stop) - max(begin, place)) for place, stop in turn.texts)
    return Encoded(
        ids=ids[:limit],
        replies=replies,
        reply_bytes=reply_bytes,
        unprompted=starts.count(None),
        ends=ends[:limit] if aligned else [],
        contents=list(rendered.contents) if aligned else [],
    )


def _encode_turns(tokenizer: Tokenizer, rendered: Rendered) -> tuple[list[int], list[int | None]]:
    """Return the tokens of a conversation, and how many of them are the prompt of each turn that has one.

    Where the tokenizer merges across the end of a prompt, the text is cut there: generation starts from the
    prompt's own ids, and so does training.
    """
    ids = tokenizer.encode(rendered.whole)
    starts: list[int | None] = []
    fixed, place = 0, 0  # tokens and characters before the last reply
    for turn in rendered.turns:
        if turn.prompt is None:
            starts.append(None)
            continue
        prompt_ids = tokenizer.encode(turn.prompt)
        start, end = len(prompt_ids), len(turn.prompt)
        if ids[:start] != prompt_ids:
            own = tokenizer.encode(turn.prompt[place:], opening=place == 0)
            rest = tokenizer.encode(rendered.whole[end:], opening=False)
            start, ids = fixed + len(own), [*ids[:fixed], *own, *rest]
        starts.append(start)
        fixed, place = start, end
    return ids, starts


def _range_of(
    turn: Turn, start: int | None, ends: Sequence[int], messages: Sequence[Message]
) -> tuple[int, int]:
    """Return the half-open range of a turn's tokens: whole ones, where the template gives no prompt."""
    first = bisect.bisect_left(ends, turn.start) + 1 if start is None else start
    last = len(ends) if turn.end is None else bisect.bisect_right(ends, turn.end)
    if turn.end is not None and first >= last:
        refuse_earlier(messages, turn.message, "has no token of its own")
    return first, last


def _place_of(place: int, messages: Sequence[Message], contents: Sequence[Content]) -> str:
    """Name the message that holds byte `place` of the rendering, or lies behind it."""
    if not contents:
        return "template text"
    content = contents[sum(content.end <= place for content in contents[:-1])]
    where = "" if content.start <= place < content.end else "template text before "
    return f"{where}message {content.message + 1} ({messages[content.message]['role']})"


def labels_of(ids: Sequence[int], replies: Sequence[int], ignored: int) -> list[int]:
    """Return `ids` inside the reply ranges (flat: start, end, start, ...) and `ignored` elsewhere."""
    labels = [ignored] * len(ids)
    for start, end in zip(replies[::2], replies[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels
