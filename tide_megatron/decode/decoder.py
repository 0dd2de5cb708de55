"""Replies of a model, many at a time: block by block, with the keys and values of finished blocks remembered.

    decoder = open_decoder(Path("runs/kl"), device)
    reply, = decoder.decode([decoder.prompt_ids([{"role": "user", "content": "Hello"}])], Decoding())

Replies come and go: each denoises its own block at its own step, one that has ended makes room for the next
prompt, and what it was decoded beside changes none of its tokens. In fp32 the cache changes none either;
what is computed in other shapes differs in its last bits, so in bf16 a near tie may fall the other way.

The model may be one that a training loop holds: it is read in eval mode, without gradients, and handed back
in the mode that it was in. Left out: models cut over tensor, pipeline or expert ranks; WeDLM's own causal
order of tokens (it is read in blocks, as the paper reads it).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.canvas import Canvas, Rules
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.passes import Stream
from tide_megatron.decode.picker import Asked, Picker
from tide_megatron.decode.reply import Reply
from tide_megatron.decode.schedule import Picks
from tide_megatron.diffusion.mask import Context
from tide_megatron.models.build import TideModel
from tide_megatron.models.cache import KeyValueCache
from tide_megatron.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

OnBlock = Callable[[int, Reply], None]
"""Takes the number of a prompt and its reply so far."""


class Decoder:
    """A model that replies."""

    def __init__(self, model: TideModel, tokenizer: Tokenizer, context: Context) -> None:
        """Remember the parts.

        Args:
            model: whole on this rank.
            tokenizer: its own, with the mask token it was trained with.
            context: in which it was trained; what was trained block_diffusion is read block_causal, which
                gives a noised block exactly what training gave it.

        Raises:
            ConfigError: the tokenizer has more ids than the model rows.
        """
        rows = model.architecture.vocabulary
        if tokenizer.vocabulary_size > rows:
            raise ConfigError(
                f"{tokenizer.name}: its tokenizer has {tokenizer.vocabulary_size} ids, its model {rows} "
                "rows; give the tokenizer and mask token it was trained with"
            )
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.block = None if context.kind == "bidirectional" else context.block_size
        """Tokens of a block; None: prompt and reply are read as one."""

    @property
    def window(self) -> int:
        """Tokens that prompt and reply may have together."""
        return self.model.architecture.max_positions

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a conversation under the chat template, ready for the assistant's turn.

        Args:
            messages: each with `role` and `content`.

        Raises:
            DataError: there is no chat template, or a message holds the mask token.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat is None:
            raise DataError(
                f"{tokenizer.name} has no chat template: add chat_template.jinja beside tokenizer.json"
            )
        ids = tokenizer.encode(tokenizer.chat.render(list(messages), add_generation_prompt=True))
        if tokenizer.mask_id in ids:
            mask = tokenizer.special_tokens["mask_token"]
            told = next((m["content"] for m in messages if mask in m["content"]), messages[-1]["content"])
            raise DataError(
                f"prompt {told!r}: contains the mask token {mask}, which only stands for what is to be "
                "filled in: remove it from the prompt"
            )
        return ids

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        options: Decoding,
        *,
        numbers: Sequence[int] | None = None,
        on_block: OnBlock | None = None,
        stop: StopFlag | None = None,
    ) -> list[Reply]:
        """Reply to prompts. Not a collective: ranks may do so each on their own.

        Args:
            prompts: token ids, as `prompt_ids` gives them.
            options: how.
            numbers: of each prompt in the whole work, on which random draws depend; None: 0, 1, ...
            on_block: called whenever a block of a reply is finished, and when it ends.
            stop: after a stop signal no further prompt is begun.

        Returns:
            A reply to each prompt, in order; where stopped, to the first ones.

        Raises:
            DataError: a prompt leaves no position for a reply.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        canvases = self._canvases(prompts, numbers, options)
        if not canvases:
            return []
        with _evaluating(self.model):
            self._run(canvases, options, on_block, stop)
        ended = [canvas.reply() for canvas in canvases if canvas.ended]
        assert len(ended) == len(canvases) or stop is not None, "every reply ends"
        return ended

    def _canvases(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], options: Decoding
    ) -> list[Canvas]:
        """Lay out the replies."""
        rules = self._rules(options)
        rooms = [self.window - len(prompt) for prompt in prompts]
        for number, prompt, room in zip(numbers, prompts, rooms, strict=True):
            if room < 1:
                raise DataError(
                    f"prompt {number}: has {len(prompt)} tokens, and the model {self.window} positions for "
                    "prompt and reply together (max_position_embeddings); shorten it"
                )
        short = sum(room < options.new_tokens for room in rooms)
        if short:
            log.info(
                "%d of %d prompts leave fewer than %d of the model's %d positions: their replies end there",
                *(short, len(prompts), options.new_tokens, self.window),
            )
        return [
            Canvas(rules, number, prompt, min(room, options.new_tokens), pads)
            for number, prompt, room, pads in zip(
                numbers, prompts, rooms, self._pads(prompts, options), strict=True
            )
        ]

    def _pads(self, prompts: Sequence[Sequence[int]], options: Decoding) -> list[int]:
        """Return the pads in front of each prompt: under `reference` up to whole blocks of its batch."""
        if options.schedule != "reference":
            return [0] * len(prompts)
        lengths, block = [len(prompt) for prompt in prompts], self.block or 1
        found = []
        for start in range(0, len(prompts), options.batch):
            batch = lengths[start : start + options.batch]
            found += [-(-max(batch) // block) * block - length for length in batch]
        return found

    def _rules(self, options: Decoding) -> Rules:
        tokenizer = self.tokenizer
        find, special = tokenizer.backend.find, tokenizer.special_tokens
        ends = [find(special[name]) for name in ("eos_token", "eot_token") if name in special]
        stops = [find(text) for text in options.stop]
        return Rules(
            options=options,
            block=self.block,
            mask_id=tokenizer.mask_id,
            pad_id=tokenizer.pad_id,
            end_ids=frozenset(token for token in ends if token is not None),
            stop_ids=frozenset(token for token in stops if token is not None and tokenizer.is_special(token)),
            decode=tokenizer.decode,
        )

    @functools.cached_property
    def _spare(self) -> list[int]:
        """Rows of a padded vocabulary that no token has."""
        rows = range(self.model.architecture.vocabulary)
        return [token for token in rows if not self.tokenizer.has(token)]

    def _streams(self, canvases: Sequence[Canvas], options: Decoding) -> list[Stream]:
        """Make the passes of a call: one kind, or with guidance two."""
        if self.block is None:
            reading = Context(kind="bidirectional", block_size=1)
            if options.cache:
                log.info("the model is bidirectional, so no prefix can be remembered: every step reads all")
        else:
            reading = Context(kind="block_causal", block_size=self.block)
        has_cache = options.cache and self.block is not None
        rows = min(options.batch, len(canvases))
        slots = max(canvas.length for canvas in canvases)
        return [
            Stream(
                self.model,
                reading,
                KeyValueCache(self.model, rows, slots) if has_cache else None,
                blind=blind,
            )
            for blind in ((False, True) if options.guidance > 0.0 else (False,))
        ]

    def _run(
        self, canvases: Sequence[Canvas], options: Decoding, on_block: OnBlock | None, stop: StopFlag | None
    ) -> None:
        """Denoise until all replies have ended, or after a stop signal all that were begun."""
        streams = self._streams(canvases, options)
        banned = self._spare if options.schedule == "reference" else [self.tokenizer.mask_id, *self._spare]
        picker = Picker(self.model.head_weight, banned, options)
        waiting, active = collections.deque(canvases), list[Canvas]()
        while waiting or active:
            while waiting and len(active) < options.batch and not (stop and stop.requested):
                active.append(waiting.popleft())
            if not active:
                return
            self._step(active, streams, picker, on_block)
            for row in reversed(range(len(active))):
                if active[row].ended:
                    _leave(active, row, streams)

    def _step(
        self, active: Sequence[Canvas], streams: Sequence[Stream], picker: Picker, on_block: OnBlock | None
    ) -> None:
        """Denoise every reply once."""
        hidden = [stream.hidden(active) for stream in streams]
        places = [(canvas, slot) for canvas in active for slot in canvas.masked]
        asked = Asked(
            numbers=[canvas.number for canvas, _ in places],
            positions=[slot - canvas.pads for canvas, slot in places],
            forwards=[canvas.forwards for canvas, _ in places],
        )
        tokens, confidence, entropy = picker(hidden[0], hidden[1] if len(hidden) > 1 else None, asked)
        at = 0
        for canvas in active:
            own = slice(at, at + len(canvas.masked))
            at = own.stop
            if streams[0].cache is not None:
                canvas.encoded = canvas.start
            picks = Picks(tokens=tokens[own], confidence=confidence[own], entropy=entropy[own])
            if canvas.commit(picks) and on_block is not None:
                on_block(canvas.number, canvas.reply())


def _leave(active: list[Canvas], row: int, streams: Sequence[Stream]) -> None:
    """Take an ended reply out; the last one's keys and values move to its row, so that rows stay a run."""
    last = active.pop()
    for stream in streams:
        stream.forget(active[row] if row < len(active) else last)
        if row < len(active) and stream.cache is not None:
            stream.cache.move(len(active), row)
    if row < len(active):
        active[row] = last


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Read a model in eval mode without gradients, and hand every module back in its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
