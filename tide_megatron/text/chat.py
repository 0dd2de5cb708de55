"""Chats as token ids: encode what `text/turns.py` renders, split prompt and reply, count bytes (spec 4.1).

Everything after a reply's prompt, the end-of-turn token included, is the reply and may be masked. Which
assistant messages are learnt is the caller's choice: the last alone, as in the reference, or several.

Chats are encoded many at a time: one call of the library, one table of token lengths and one running sum for
all of them. A prompt is not encoded again where it need not be: it ends as the tokens behind its last
special token say, because a special token cuts a text (`_Tokens.prompt_tokens`). Where that says nothing,
or the tokenizer merges across the end of a prompt, the prompt is encoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy

from tide_megatron.base.errors import RecordError
from tide_megatron.text.spelling import SpellingError
from tide_megatron.text.templates import Inputs, Message
from tide_megatron.text.templates.places import Content
from tide_megatron.text.tokenizer import Ends, Tokenizer
from tide_megatron.text.turns import Chat, Rendered, Turn, refuse_earlier, render_chat

_LONGEST_END = 64
"""Most tokens behind a prompt's last special token that are looked at."""
_UNKNOWN = -1
_NO_ENDS = numpy.empty(0, dtype=numpy.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One conversation in tokens."""

    ids: list[int]
    replies: list[int]
    """Half-open ranges of `ids` that may be masked, ascending and disjoint, flat: start, end, start, ..."""
    reply_bytes: int
    """UTF-8 bytes of the replies' texts within `ids` (what NLL per byte divides by): content, reasoning and
    tool calls as they are rendered; other template text is not counted."""
    uncut_tokens: int
    """How many there would be without a cut."""
    unprompted: int = 0
    """Replies among them that the template writes without their generation prompt (`text/turns.py`)."""
    ends: Ends = dataclasses.field(default_factory=lambda: _NO_ENDS)
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
    """Encode one conversation; see `Chat` for its parts and `encode_chats` for the rest.

    Args:
        tokenizer: must have a chat template.
        messages: as in `Chat`.
        inputs: as in `Chat`.
        learnt: as in `Chat`.
        max_tokens: cut here; None: keep all. A prompt that leaves no room for the reply is the
            caller's to refuse.
        aligned: also give `ends` and `contents`, which alignment with another tokenizer stands on.

    Raises:
        DataError: as `encode_chats`.
        RecordError: what `encode_chats` gives in its place.
    """
    chat = Chat(messages=messages, inputs=inputs or Inputs(), learnt=learnt)
    [found] = encode_chats(tokenizer, [chat], max_tokens=max_tokens, aligned=aligned)
    if isinstance(found, RecordError):
        raise found
    return found


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[Chat], *, max_tokens: int | None = None, aligned: bool = False
) -> list[Encoded | RecordError]:
    """Encode conversations, each as if it were alone.

    Args:
        tokenizer: must have a chat template.
        chats: the conversations.
        max_tokens: as for `encode_chat`.
        aligned: as for `encode_chat`.

    Returns:
        For each what it is in tokens, or why it has none: a template that fails or loses something, an
        earlier reply that cannot be learnt as it would be written, text that holds the mask token, or tokens
        whose bytes do not spell the text. The message does not know the file and line; the caller puts them
        in front.

    Raises:
        DataError: no template, or one that does not parse; or tokens that have no bytes.
    """
    found = [_rendered(tokenizer, chat) for chat in chats]
    good = [one for one in found if not isinstance(one, RecordError)]
    texts = [one.whole.encode() for one in good]
    ids = tokenizer.encode_batch([one.whole for one in good])
    plain = [number for number, some in enumerate(ids) if tokenizer.mask_id not in some]
    spelt = tokenizer.all_ends([ids[number] for number in plain], [texts[number] for number in plain])
    ends = dict(zip(plain, spelt, strict=True))
    tokens = (
        _Tokens(tokenizer, one, texts[number], ids[number], ends.get(number))
        for number, one in enumerate(good)
    )
    return [
        one if isinstance(one, RecordError) else _encoded(next(tokens), max_tokens, aligned=aligned)
        for one in found
    ]


def _rendered(tokenizer: Tokenizer, chat: Chat) -> Rendered | RecordError:
    try:
        return render_chat(tokenizer, chat)
    except RecordError as fault:
        return fault


def _encoded(tokens: _Tokens, max_tokens: int | None, *, aligned: bool) -> Encoded | RecordError:
    """Return what a conversation is in tokens, or what is wrong with them."""
    try:
        return tokens.encoded(max_tokens, aligned=aligned)
    except RecordError as fault:
        return fault


class _Tokens:
    """A rendered conversation and its tokens."""

    def __init__(
        self, tokenizer: Tokenizer, rendered: Rendered, text: bytes, ids: list[int], ends: Ends | None
    ) -> None:
        """Take what was rendered, the same in UTF-8, and its ids, which may need another look.

        Args:
            tokenizer: of the ids.
            rendered: the conversation.
            text: in UTF-8.
            ids: of the whole text.
            ends: of these; None: not known.
        """
        self._tokenizer, self._rendered, self._text, self._ids = tokenizer, rendered, text, ids
        self._ends = ends

    def encoded(self, max_tokens: int | None, *, aligned: bool) -> Encoded:
        """Find the replies, cut, and count.

        Raises:
            RecordError: what is wrong.
        """
        starts = self._starts()
        ids, ends = self._ids, self._ends
        assert ends is not None, "what has starts has ends"
        limit = min(len(ids), max_tokens or len(ids))
        replies: list[int] = []
        reply_bytes = 0
        for turn, start in zip(self._rendered.turns, starts, strict=True):
            first, last = self._range(turn, start, ends)
            if first < limit or not replies:
                replies += [min(first, limit), min(last, limit)]
                begin = int(ends[first - 1]) if start is None else 0
                end = int(ends[min(last, limit) - 1])
                reply_bytes += sum(max(0, min(end, stop) - max(begin, place)) for place, stop in turn.texts)
        return Encoded(
            ids=ids[:limit],
            replies=replies,
            reply_bytes=reply_bytes,
            uncut_tokens=len(ids),
            unprompted=starts.count(None),
            ends=ends[:limit] if aligned else _NO_ENDS,
            contents=list(self._rendered.contents) if aligned else [],
        )

    def _range(self, turn: Turn, start: int | None, ends: Ends) -> tuple[int, int]:
        """Return the half-open range of a turn's tokens: whole ones, where the template gives no prompt."""
        first = int(ends.searchsorted(turn.start)) + 1 if start is None else start
        last = len(ends) if turn.end is None else int(ends.searchsorted(turn.end, "right"))
        if turn.end is not None and first >= last:
            refuse_earlier(self._rendered.messages, turn.message, "has no token of its own")
        return first, last

    def _starts(self) -> list[int | None]:
        """Return how many tokens are the prompt of each turn that has one; `_ends` are known afterwards.

        Raises:
            RecordError: the text holds the mask token, or the tokens do not spell it.
        """
        if self._ends is None and self._tokenizer.mask_id not in self._ids:
            with contextlib.suppress(SpellingError):
                self._ends = numpy.asarray(self._tokenizer.ends(self._ids, self._rendered.whole))
        if self._ends is not None:
            starts = [
                None if turn.prompt is None else self._prompt_tokens(turn, self._ends)
                for turn in self._rendered.turns
            ]
            if _UNKNOWN not in starts:
                return starts
        return self._encode_prompts()

    def _prompt_tokens(self, turn: Turn, ends: Ends) -> int:
        """Return how many of the ids are the prompt's own ids, or `_UNKNOWN`.

        A special token cuts a text: what stands before it is encoded alike whatever follows, and what follows
        alike whatever stands before. So the prompt's ids are those up to its last special token, and those
        of what is behind it.
        """
        ids, special = self._ids, self._tokenizer.backend.special
        place = int(ends.searchsorted(turn.start))
        if place < len(ids) and ends[place] == turn.start and ids[place] in special:
            return place + 1
        nearest = range(place - 1, max(-1, place - 1 - _LONGEST_END), -1)
        cut = next((token for token in nearest if ids[token] in special), None)
        if cut is None:
            return _UNKNOWN
        behind = self._tokenizer.behind_special(ids[cut], self._text[ends[cut] : turn.start].decode())
        start = cut + len(behind)
        return start if ids[cut:start] == behind else _UNKNOWN

    def _encode_prompts(self) -> list[int | None]:
        """Encode every prompt, and cut the text behind one where the tokenizer merges across its end.

        Generation starts from the prompt's own ids, and so does training.
        """
        tokenizer, whole = self._tokenizer, self._rendered.whole
        ids = tokenizer.encode(whole)
        starts: list[int | None] = []
        fixed, place = 0, 0  # tokens and characters before the last reply
        for turn in self._rendered.turns:
            if turn.prompt is None:
                starts.append(None)
                continue
            prompt_ids = tokenizer.encode(turn.prompt)
            start, end = len(prompt_ids), len(turn.prompt)
            if ids[:start] != prompt_ids:
                own = tokenizer.encode(turn.prompt[place:], opening=place == 0)
                rest = tokenizer.encode(whole[end:], opening=False)
                start, ids = fixed + len(own), [*ids[:fixed], *own, *rest]
            starts.append(start)
            fixed, place = start, end
        self._ids, self._ends = ids, self._spelt(ids)
        return starts

    def _spelt(self, ids: list[int]) -> Ends:
        """Return the byte behind each of the ids, or refuse them."""
        if self._tokenizer.mask_id in ids:
            raise RecordError(
                "the text contains the mask token, which only the noise may write: remove it from the record",
                "text with the mask token",
            )
        try:
            return numpy.asarray(self._tokenizer.ends(ids, self._rendered.whole))
        except SpellingError as error:
            place = _place_of(error.place, self._rendered)
            raise RecordError(f"{place}: {error}", "text that the tokenizer changes") from None


def _place_of(place: int, rendered: Rendered) -> str:
    """Name the message that holds byte `place` of the rendering, or lies behind it."""
    contents = rendered.contents
    if not contents:
        return "template text"
    content = contents[sum(content.end <= place for content in contents[:-1])]
    where = "" if content.start <= place < content.end else "template text before "
    return f"{where}message {content.message + 1} ({rendered.messages[content.message]['role']})"


def labels_of(ids: Sequence[int], replies: Sequence[int], ignored: int) -> list[int]:
    """Return `ids` inside the reply ranges (flat: start, end, start, ...) and `ignored` elsewhere."""
    labels = [ignored] * len(ids)
    for start, end in zip(replies[::2], replies[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels
