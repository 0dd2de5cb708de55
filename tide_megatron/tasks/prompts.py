"""From a question to the tokens that a model reads: template, thinking block, prefix, and the model's window.

**Thinking.** The reference appends an empty thinking block to every prompt that does not end in one and cuts
thoughts out of replies (spec section 7), because its student was taught on replies that begin so. `auto` does
it for models whose tokenizer has `</think>` as one token of its own; for others the block would be text that
they have never seen.

**Window.** A prompt and its reply have to fit into the positions that the model was made for. A prompt that
leaves fewer new tokens than were asked for gets those that it leaves, as many of them a step as ever; one
that leaves none is not decoded: it counts as answered wrong, and the result says how many there were of each.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from tide_megatron.base.errors import DataError
from tide_megatron.decode.options import Decoding
from tide_megatron.text.tokenizer import Tokenizer

Think = Literal["auto", "always", "never"]
THINK_BLOCK = "<think>\n\n</think>\n\n"
_THOUGHTS = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_END = "</think>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """How a model is asked."""

    tokenizer: Tokenizer
    window: int
    """Positions that the model was made for."""
    think: Think = "auto"

    def __post_init__(self) -> None:
        """Refuse a tokenizer without a chat template.

        Raises:
            DataError: it has none.
        """
        if self.tokenizer.chat is None:
            raise DataError(
                f"{self.tokenizer.name} has no chat template, so it cannot be asked a question: add "
                "chat_template.jinja beside tokenizer.json"
            )

    @property
    def thinks(self) -> bool:
        """Whether prompts end in an empty thinking block, and thoughts are cut out of replies."""
        if self.think != "auto":
            return self.think == "always"
        end = self.tokenizer.encode(_END, opening=False)
        return len(end) == 1

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return what the model reads before its reply.

        Args:
            messages: {"role", "content"} each.

        Raises:
            DataError: messages that the template does not take.
        """
        assert self.tokenizer.chat is not None, "a Prompts has a template"
        text = self.tokenizer.chat.render(messages, add_generation_prompt=True)
        if self.thinks and not text.rstrip().endswith(_END):
            text += THINK_BLOCK
        return text

    def ids(self, text: str, name: str, prefix: str = "") -> list[int]:
        """Return the tokens of what the model reads.

        Args:
            text: as `text` gives it.
            name: of the question, for the message.
            prefix: how the reply begins; cut into tokens by itself, as a reply is.

        Raises:
            DataError: it holds the mask token.
        """
        ids = self.tokenizer.encode(text)
        if prefix:
            ids += self.tokenizer.encode(prefix, opening=False)
        if self.tokenizer.mask_id in ids:
            mask = self.tokenizer.special_tokens["mask_token"]
            raise DataError(
                f"question {name}: holds the mask token {mask}, which only stands for what is to be filled in"
            )
        return ids

    def room(self, tokens: int, decoding: Decoding) -> int:
        """Return how many new tokens a prompt of so many leaves of those asked for; 0: none."""
        return max(0, min(decoding.new_tokens, self.window - tokens))

    def no_room(self, tokens: int) -> str:
        """Say why a prompt of so many tokens has no reply."""
        return f"its prompt of {tokens} tokens leaves no room in the model's window of {self.window}"

    def reply(self, text: str) -> str:
        """Return a reply without its thoughts, where this model is asked to have none."""
        return _THOUGHTS.sub("", text) if self.thinks else text
