"""Chats in tokens as they were encoded before that was made fast: one record, one message at a time.

An oracle, kept as it stood: it renders every skeleton anew, encodes every prompt and walks over tokens in
Python. Templates, vocabularies and errors are the package's; none of its caches, arrays or batches is used.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

from tests.plain_places import pieces
from tide_megatron.base.errors import RecordError
from tide_megatron.text.spelling import SpellingError, ends_of
from tide_megatron.text.templates import ChatTemplate, Inputs, Message
from tide_megatron.text.templates.places import Content
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.text.turns import Rendered, Turn, refuse_earlier


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainEncoded:
    """One conversation in tokens."""

    ids: list[int]
    replies: list[int]
    reply_bytes: int
    unprompted: int
    ends: list[int]
    contents: list[Content]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    inputs: Inputs | None = None,
    learnt: Sequence[int] | None = None,
    max_tokens: int | None = None,
    aligned: bool = False,
) -> PlainEncoded:
    """Encode a conversation whose last message is a reply to learn.

    Args:
        tokenizer: must have a chat template.
        messages: at least one message before the reply; see `data.sources.record` for what a record may be.
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
    rendered = _render_chat(tokenizer, messages, inputs or Inputs(), chosen)
    ids, starts = _encode_turns(tokenizer, rendered)
    if tokenizer.mask_id in ids:
        raise RecordError(
            "the text contains the mask token, which only the noise may write: remove it from the record",
            "text with the mask token",
        )
    try:
        ends = _ends(tokenizer, ids, rendered.whole)
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
    return PlainEncoded(
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


def _ends(tokenizer: Tokenizer, ids: list[int], text: str) -> list[int]:
    """Return the byte behind each token, from the pieces of the vocabulary file."""
    return ends_of(
        pieces=[tokenizer.backend.piece(token) for token in ids],
        is_special=[token in tokenizer.backend.special for token in ids],
        text=text,
        who=tokenizer.name,
        advice=tokenizer.backend.advice,
    )


def _render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], inputs: Inputs, learnt: Sequence[int]
) -> Rendered:
    """Render a conversation and find what is to be learnt.

    Args:
        tokenizer: must have a chat template.
        messages: see `data.sources.record` for what a record may be.
        inputs: what the template is given beside them.
        learnt: as for `text.chat.encode_chat`.

    Raises:
        DataError: no template, or one that does not parse.
        RecordError: a template that fails or loses something, or a reply that cannot be learnt.
    """
    tokenizer.chat.check(messages, inputs)
    chat = _Conversation(tokenizer.chat, messages, inputs)
    contents, tail = pieces(tokenizer.chat, messages, chat.whole, inputs)
    _check_shown(messages, contents)
    assert learnt[-1] == len(messages) - 1, "the last message is learnt"
    turns = [*(chat.earlier(number, contents) for number in learnt[:-1]), chat.last(contents, tail)]
    for turn, following in itertools.pairwise(turns):
        if turn.end is None or turn.end > following.start:
            refuse_earlier(messages, turn.message, "runs into the next one")
    return Rendered(messages=messages, whole=chat.whole, contents=contents, turns=turns)


class _Conversation:
    """Messages and what a template makes of them."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], inputs: Inputs) -> None:
        """Render them, and the prompt of the last."""
        self._template, self._messages, self._inputs = template, messages, inputs
        self._prompt = self._render(messages[:-1], asks=True)
        self.whole = self._render(messages)
        if not self.whole.startswith(self._prompt):
            thinks = "reasoning_content" in messages[-1]
            raise RecordError(
                f"the chat template ({template.origin}) renders the prompt differently once the reply is "
                "there, so the two cannot be told apart: use a template whose generation prompt opens its "
                "replies" + ", or give the option enable_thinking=true" * thinks,
                "the template's prompt does not open the reply",
            )

    def last(self, contents: Sequence[Content], tail: str) -> Turn:
        """Return the turn of the last message."""
        number, start = len(self._messages) - 1, len(self._prompt.encode())
        texts = [(content.start, content.end) for content in contents if content.message == number]
        if self._messages[-1].get("tool_calls"):
            first = max([start, *(content.end for content in contents)])
            texts.append((first, len(self.whole.encode()) - self._closing_bytes(self._messages, tail)))
        return Turn(prompt=self._prompt, start=start, end=None, texts=texts, message=number)

    def earlier(self, number: int, contents: Sequence[Content]) -> Turn:
        """Return the turn of an earlier message, or refuse to learn it."""
        message = self._messages[number]
        own = [content for content in contents if content.message == number]
        is_shown = any(content.key != "content" and content.end > content.start for content in own)
        if message.get("reasoning_content") and not is_shown:
            refuse_earlier(
                self._messages, number, "has reasoning, which the template does not show in earlier turns"
            )
        prompt: str | None = self._render(self._messages[:number], asks=True)
        assert prompt is not None, "rendered"
        start = len(prompt.encode())
        if not self.whole.startswith(prompt):
            if not own:
                refuse_earlier(
                    self._messages, number, "has no content behind the opening that the template writes"
                )
            prompt, start = None, own[0].start
        shown = self._messages[: number + 1]
        closed = self._render(shown)
        _, tail = pieces(self._template, shown, closed, self._inputs)
        behind = own[-1].end if own else start
        end = behind + len(tail.encode())
        if self.whole.startswith(closed):
            end = len(closed.encode())
        elif not own or not self.whole.encode().startswith(tail.encode(), behind):
            refuse_earlier(self._messages, number, "is closed differently than a last one")
        texts = [(content.start, content.end) for content in own]
        if message.get("tool_calls"):
            texts.append((behind, end - self._closing_bytes(shown, tail)))
        return Turn(prompt=prompt, start=start, end=end, texts=texts, message=number)

    def _render(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        return self._template.render(messages, add_generation_prompt=asks, inputs=self._inputs)

    def _closing_bytes(self, messages: Sequence[Message], tail: str) -> int:
        """Count the bytes of template text that closes a reply which ends in tool calls.

        Args:
            messages: the conversation up to it.
            tail: what was rendered behind the last text, the calls among it.
        """
        silent = {key: value for key, value in messages[-1].items() if key != "tool_calls"}
        silent.setdefault("content", "")
        try:
            without = self._render([*messages[:-1], silent])
        except RecordError:  # it does not show such a reply, so nobody can tell what closes it
            return 0
        pairs = zip(reversed(tail), reversed(without), strict=False)
        same = next((at for at, (left, right) in enumerate(pairs) if left != right), None)
        return len(tail[len(tail) - (min(len(tail), len(without)) if same is None else same) :].encode())


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
