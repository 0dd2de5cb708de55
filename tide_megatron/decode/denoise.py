"""The loop of decoding: replies come and go, and each step denoises all that are under way once."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.canvas import Canvas
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.passes import Stream
from tide_megatron.decode.picker import Asked, Picker
from tide_megatron.decode.reply import Reply
from tide_megatron.decode.schedule import Picks
from tide_megatron.diffusion.mask import Context
from tide_megatron.models.build import TideModel
from tide_megatron.models.cache import KeyValueCache

log = logging.getLogger(__name__)

OnBlock = Callable[[int, Reply], None]
"""Takes the number of a prompt and its reply so far."""


def denoise(
    model: TideModel,
    context: Context,
    canvases: Sequence[Canvas],
    options: Decoding,
    banned: Sequence[int],
    *,
    on_block: OnBlock | None = None,
    stop: StopFlag | None = None,
) -> None:
    """Denoise canvases until all have ended, or after a stop signal those that were begun.

    Args:
        model: whole on this rank; read in eval mode without gradients, and handed back as it was.
        context: in which it was trained.
        canvases: in the order in which they are begun; at least one.
        options: how.
        banned: ids that are never written.
        on_block: called whenever a block of a reply is finished, and when it ends.
        stop: after a stop signal no further one is begun.
    """
    streams = _streams(model, context, canvases, options)
    picker = Picker(model.head_weight, banned, options)
    waiting, active = collections.deque(canvases), list[Canvas]()
    with _evaluating(model):
        while waiting or active:
            while waiting and len(active) < options.batch and not (stop and stop.requested):
                active.append(waiting.popleft())
            if not active:
                return
            _step(active, streams, picker, on_block)
            for row in reversed(range(len(active))):
                if active[row].ended:
                    _leave(active, row, streams)


def _streams(
    model: TideModel, context: Context, canvases: Sequence[Canvas], options: Decoding
) -> list[Stream]:
    """Make the passes of a call: one kind, or with guidance two."""
    has_blocks = context.kind != "bidirectional"
    if options.cache and not has_blocks:
        log.info("the model is bidirectional, so no prefix can be remembered: every step reads everything")
    rows = min(options.batch, len(canvases))
    slots = max(canvas.length for canvas in canvases)
    # A block model that reads clean blocks and one noised one is block-causal, whatever it was trained as.
    reading = Context(kind="block_causal" if has_blocks else "bidirectional", block_size=context.block_size)
    return [
        Stream(
            model,
            reading,
            KeyValueCache(model, rows, slots) if options.cache and has_blocks else None,
            blind=blind,
        )
        for blind in ((False, True) if options.guidance > 0.0 else (False,))
    ]


def _step(
    active: Sequence[Canvas], streams: Sequence[Stream], picker: Picker, on_block: OnBlock | None
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
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
