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

import functools
import logging
from collections.abc import Mapping, Sequence

from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.canvas import Canvas, Rules
from tide_megatron.decode.denoise import OnBlock, denoise
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.reply import Reply
from tide_megatron.diffusion.mask import Context
from tide_megatron.models.build import TideModel
from tide_megatron.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


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
            ConfigError: the tokenizer has more ids than the model rows, or the model is cut over ranks.
        """
        groups = model.groups
        if max(groups.tp.size(), groups.pp.size(), groups.ep.size(), groups.expt_tp.size()) > 1:
            raise ConfigError(
                "layout: only a model that is whole on each rank writes text, and this one is cut over "
                "several; open its checkpoint, or the finished model"
            )
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
        """Return the tokens of a conversation, ready for the assistant's turn; see `prompt_ids` below."""
        return prompt_ids(self.tokenizer, messages)

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
        banned = self._spare if options.schedule == "reference" else [self.tokenizer.mask_id, *self._spare]
        denoise(self.model, self.context, canvases, options, banned, on_block=on_block, stop=stop)
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


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the tokens of a conversation under the chat template, ready for the assistant's turn.

    Args:
        tokenizer: of the model.
        messages: each with `role` and `content`.

    Raises:
        DataError: there is no chat template, or a message holds the mask token.
    """
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
