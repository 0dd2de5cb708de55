"""A conversation with a model: history, system prompt, the model's window."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tide_megatron.base.errors import DataError
from tide_megatron.decode.decoder import Decoder
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.reply import Reply

OnText = Callable[[str], None]
"""Takes what is new of a reply."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What came of a message."""

    reply: Reply | None
    """None: it was interrupted before its first block was finished; the message is forgotten, too."""
    dropped: int
    """Oldest messages that left the history because the window has no room for them."""
    room: int
    """Tokens that the reply could have had."""
    is_interrupted: bool


class Dialogue:
    """Messages so far, and a model that goes on.

    Random draws depend on the seed and the number of the turn, so a conversation can be had again.
    """

    def __init__(self, decoder: Decoder, options: Decoding, system: str | None = None) -> None:
        """Begin a conversation.

        Args:
            decoder: the model.
            options: how it replies.
            system: prompt; None: none.
        """
        self.decoder, self.options, self.system = decoder, options, system
        self.history: list[dict[str, str]] = []
        self._turns = 0

    @property
    def messages(self) -> list[Mapping[str, str]]:
        """The system prompt and the history."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, *self.history]

    def reset(self) -> None:
        """Forget the history; the system prompt stays."""
        self.history = []

    def ask(self, text: str, on_text: OnText) -> Said:
        """Say something, and let the model reply. A KeyboardInterrupt ends the reply and not the dialogue.

        Args:
            text: the user's message.
            on_text: gets the reply's text, block by block.

        Returns:
            What came of it; the history goes on with it.

        Raises:
            DataError: a message that the model cannot read, or that leaves it no room; the history is as it
                was.
        """
        before = list(self.history)
        self.history.append({"role": "user", "content": text})
        try:
            ids, dropped = self._fit()
        except DataError:
            self.history = before
            raise
        shown = _Shown(on_text)
        reply, is_interrupted = None, False
        try:
            (reply,) = self.decoder.decode([ids], self.options, numbers=[self._turns], on_block=shown.block)
        except KeyboardInterrupt as end:
            if type(end) is not KeyboardInterrupt:
                raise  # somebody asks the process to end
            reply, is_interrupted = shown.reply, True
        self._turns += 1
        if reply is None:
            self.history = before
        else:
            shown.finish(reply.text)
            self.history.append({"role": "assistant", "content": reply.text})
        room = min(self.options.new_tokens, self.decoder.window - len(ids))
        return Said(reply=reply, dropped=dropped, room=room, is_interrupted=is_interrupted)

    def _fit(self) -> tuple[list[int], int]:
        """Return the prompt's tokens, and how many of the oldest messages had to go.

        A reply is left `new_tokens`, or half of the window where that is less; one message may leave less.

        Raises:
            DataError: the message alone fills the window.
        """
        window, dropped = self.decoder.window, 0
        wanted = min(self.options.new_tokens, window // 2)
        while True:
            ids = self.decoder.prompt_ids(self.messages)
            if len(ids) + wanted <= window:
                return ids, dropped
            if len(self.history) == 1:
                break
            oldest = 2 if self.history[1]["role"] == "assistant" else 1
            self.history, dropped = self.history[oldest:], dropped + oldest
        if len(ids) >= window:
            raise DataError(
                f"the message has {len(ids)} tokens with the system prompt and the template around it, and "
                f"the model {window} positions for it and the reply together; shorten it"
            )
        return ids, dropped

    def save(self, file: Path) -> None:
        """Append the conversation to a file, as one line that `tide prepare` and `tide sample` read.

        Raises:
            OSError: the disk refuses.
        """
        line = json.dumps({"messages": self.messages}, ensure_ascii=False)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


class _Shown:
    """What of a reply has been shown: it only grows, and half a character waits for its other half."""

    def __init__(self, on_text: OnText) -> None:
        self.reply: Reply | None = None
        self._on_text, self._text = on_text, ""

    def block(self, number: int, reply: Reply) -> None:
        """Show what a block has brought; a callback of `Decoder.decode`."""
        self.reply = reply
        self._show(reply.text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def finish(self, text: str) -> None:
        """Show the rest."""
        self._show(text)

    def _show(self, text: str) -> None:
        if text.startswith(self._text) and text != self._text:
            self._on_text(text[len(self._text) :])
            self._text = text
