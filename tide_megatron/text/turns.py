"""A conversation as text: what the template writes, where each message stands, and the replies to learn.

The prompt of a reply is what a model sees when it is asked: the template over all messages before it, with
the generation prompt. The reply is what follows, to the end of its turn (for the last message: to the end of
the text). The reference searches decoded text for contents; here a reply starts where its rendered prompt
ends, which cannot be found in a wrong place.

Where several replies are learnt, the prompts of the earlier ones must open the whole conversation as well.
Some templates write earlier turns otherwise than the last: Qwen3's opens a last reply with a thought, empty
or not, and writes none in earlier turns. What follows is then decided here, once:

- An earlier reply without reasoning is learnt from its content on (`Turn.prompt` is None, and `tide prepare`
  counts it): the model is shown and learns just what stands there, behind another opening than it will be
  asked with.
- An earlier reply whose reasoning is not shown is refused: half a reply would be learnt as a whole one.
- So is one of which nothing marks the start or the end.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NoReturn

from tide_megatron.base.errors import DataError, RecordError
from tide_megatron.text.templates import ChatTemplate, Inputs, Message, template_names
from tide_megatron.text.templates.places import Content
from tide_megatron.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """One conversation to encode, whose last message is a reply to learn."""

    messages: Sequence[Message]
    """At least one before the reply; see `data.sources.record` for what a record may be."""
    inputs: Inputs = dataclasses.field(default_factory=Inputs)
    """What the template is given beside them."""
    learnt: Sequence[int] | None = None
    """Which messages are replies to learn, by index, ascending, the last message among them, the first not;
    None: the last alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One reply to learn in the rendered text; places are bytes of UTF-8."""

    prompt: str | None
    """What is rendered before it, the generation prompt at its end; None: the template writes this turn
    without one."""
    start: int
    end: int | None
    """Behind its turn; None: the end of the text."""
    texts: Sequence[tuple[int, int]]
    """Half-open ranges of its reasoning, content and tool calls."""
    message: int = 0
    """Its index."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text."""

    messages: Sequence[Message]
    whole: str
    contents: Sequence[Content]
    """Place of each text, by message and in each its reasoning before its content."""
    turns: Sequence[Turn]
    """The replies to learn, in order; the last message is the last one."""


def render_chat(tokenizer: Tokenizer, conversation: Chat) -> Rendered:
    """Render a conversation and find what is to be learnt.

    Raises:
        DataError: no template, or one that does not parse.
        RecordError: a template that fails or loses something, or a reply that cannot be learnt.
    """
    if tokenizer.chat is None:
        raise DataError(
            f"{tokenizer.name} has no chat template: add chat_template.jinja beside it, or name one "
            f"of this package (template=...: {', '.join(template_names())})"
        )
    messages, inputs = conversation.messages, conversation.inputs
    learnt = (len(messages) - 1,) if conversation.learnt is None else conversation.learnt
    tokenizer.chat.check(messages, inputs)
    chat = _Conversation(tokenizer.chat, messages, inputs)
    contents, tail = tokenizer.chat.pieces(messages, chat.whole, inputs)
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
        _, tail = self._template.pieces(shown, closed, self._inputs)
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


def refuse_earlier(messages: Sequence[Message], number: int, why: str) -> NoReturn:
    """Refuse to learn an earlier reply; `why` goes on a sentence about it."""
    raise RecordError(
        f"message {number + 1} ({messages[number]['role']}): this earlier reply {why}, so it cannot be "
        "learnt: give it weight 0, make a record that ends there, or learn the last reply only",
        "an earlier reply that cannot be learnt",
    )
