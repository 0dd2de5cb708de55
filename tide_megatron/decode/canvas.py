"""One reply under way: prompt, committed tokens and masked places, and what is known of its end.

Everything here is plain arithmetic on the host; a canvas knows neither the model nor the other replies.

A *slot* is a place in prompt and reply. Blocks are counted in slots, from the prompt's first token on, as in
training; the block in which the prompt ends begins with its visible tokens. Under `reference` pads stand in
front, and whatever is a pad is seen by nobody and has no position (spec section 7).

A block whose places before the first end token are filled needs no further step, for what is committed never
changes; the same holds for a stop text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tide_megatron.decode.options import Decoding
from tide_megatron.decode.reply import Ending, Reply
from tide_megatron.decode.schedule import Picks, block_steps, choose, planned_counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What the canvases of one call share."""

    options: Decoding
    block: int | None
    """Tokens of a block; None: prompt and reply are one, as a bidirectional model reads them."""
    mask_id: int
    pad_id: int
    end_ids: frozenset[int]
    """Tokens that end a reply."""
    stop_ids: frozenset[int]
    """Tokens whose spelling is one of the stop texts."""
    decode: Callable[[Sequence[int]], str]
    """Tokens to text, without the special ones."""

    @property
    def hides_pads(self) -> bool:
        """Whether tokens that are the pad are seen by nobody."""
        return self.options.schedule == "reference"


class Canvas:
    """One reply under way."""

    def __init__(
        self, rules: Rules, number: int, prompt: Sequence[int], new_tokens: int, pads: int = 0
    ) -> None:
        """Begin with everything masked.

        Args:
            rules: of the call.
            number: of the prompt in the whole work.
            prompt: token ids.
            new_tokens: longest reply.
            pads: pad tokens in front of the prompt.
        """
        self.rules, self.number, self.pads = rules, number, pads
        self.ids = [*[rules.pad_id] * pads, *prompt, *[rules.mask_id] * new_tokens]
        """[length] tokens; those of masked slots are the mask."""
        self.reply_start, self.length = pads + len(prompt), len(self.ids)
        self.block = rules.block or self.length
        self.order = [-1] * new_tokens
        """[new tokens] forward at which each was committed; -1: not yet."""
        self.forwards = 0
        self.ended: Ending | None = None
        self.encoded = 0
        """Slots whose keys and values a cache holds for good."""
        self.positions = list(range(self.length))
        """[length] rotary position of each slot."""
        self.visible: Tensor | None = None
        """[length] bool: which slots anybody sees; None: all."""
        self._looked_at = self.reply_start  # slots before it were searched for an end
        self._reply_stop = self.length  # where the reply ends
        self._cut: int | None = None  # characters before a stop text
        self._steps = block_steps(rules.options, self.block)
        self._begin(self.reply_start // self.block * self.block)

    def _begin(self, start: int) -> None:
        """Begin the block at a slot."""
        self.start, self.end = start, min(start + self.block, self.length)
        self.masked = list(range(max(start, self.reply_start), self.end))
        """Slots of the block that are still to be filled, from left to right."""
        self._counts = planned_counts(len(self.masked), self._steps)
        self._step = 0
        if self.rules.hides_pads:
            self.visible = torch.tensor([token != self.rules.pad_id for token in self.ids])
            self.positions = (self.visible.long().cumsum(0) - 1).clamp_min(0).tolist()

    def fed(self, start: int, stop: int, *, blind: bool) -> list[int]:
        """Return the tokens of some slots; `blind` masks the prompt, as guidance's other pass reads it."""
        tokens = self.ids[start:stop]
        if not blind:
            return tokens
        kept = (self.rules.pad_id,) if self.rules.hides_pads else ()
        given = max(0, self.reply_start - start)
        return [token if token in kept else self.rules.mask_id for token in tokens[:given]] + tokens[given:]

    def commit(self, picks: Picks) -> bool:
        """Take one forward's picks of the masked slots; say whether that finished a block, or the reply."""
        chosen = choose(self.rules.options, picks, self._planned())
        for place in chosen:
            slot, token = self.masked[place], picks.tokens[place]
            self.ids[slot] = token
            self.order[slot - self.reply_start] = self.forwards
        # The reference may write the mask token, which leaves a place masked.
        self.masked = [slot for slot in self.masked if self.ids[slot] == self.rules.mask_id]
        self.forwards += 1
        self._step += 1
        is_over = self.rules.options.schedule == "reference" and self._step == len(self._counts)
        is_done = not self.masked or is_over
        self._look_for_end(self.end if is_done else self.masked[0])
        if self.ended is None and is_done:
            if self.end == self.length:
                self.ended = "length"
            else:
                self._begin(self.end)
        return is_done or self.ended is not None

    def _planned(self) -> int:
        """Return how many tokens this step has to commit."""
        if self.rules.options.schedule in ("count", "reference"):
            return self._counts[self._step]
        left = max(1, self._steps - self._step)
        return -(-len(self.masked) // left)

    def _look_for_end(self, stop: int) -> None:
        """Look for an end token or a stop text before a slot, up to which everything is filled."""
        if stop == self._looked_at:
            return
        for slot in range(self._looked_at, stop):
            if self.ids[slot] in self.rules.end_ids or self.ids[slot] in self.rules.stop_ids:
                self.ended = "eos" if self.ids[slot] in self.rules.end_ids else "stop"
                self._reply_stop = stop = slot
                break
        self._looked_at = max(stop, self._looked_at)
        texts = self.rules.options.stop
        if texts:
            text = self.rules.decode(self.ids[self.reply_start : stop])
            places = [place for place in (text.find(one) for one in texts) if place >= 0]
            if places:
                self.ended, self._cut = "stop", min(places)
                self._reply_stop = self._slots_of(self._cut)

    def _slots_of(self, characters: int) -> int:
        """Return the slot behind the fewest tokens that spell so many characters of the reply."""
        return next(
            stop
            for stop in itertools.count(self.reply_start)
            if len(self.rules.decode(self.ids[self.reply_start : stop])) >= characters
        )

    def reply(self) -> Reply:
        """Return the reply, or of one that goes on what its finished blocks hold."""
        stop = self._reply_stop if self.ended else max(self.start, self.reply_start)
        ids = self.ids[self.reply_start : stop]
        return Reply(
            ids=tuple(ids),
            text=self.rules.decode(ids)[: self._cut],
            order=tuple(self.order[: len(ids)]),
            ended=self.ended,
            forwards=self.forwards,
        )
