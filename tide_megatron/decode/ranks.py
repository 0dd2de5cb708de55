"""Prompts spread over ranks, each with the whole model; the replies come back in order on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.decoder import Decoder, prompt_ids
from tide_megatron.decode.opening import find
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.reply import Reply
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.options import Arithmetic
from tide_megatron.parallel.collectives import fail_together, gather_objects, own_share


def answer_prompts(
    place: Path,
    prompts: Sequence[str],
    options: Decoding,
    context: Context | None = None,
    mask: str | None = None,
    arithmetic: Arithmetic | None = None,
    *,
    device: Device,
    stop: StopFlag,
) -> list[Reply]:
    """Open a model on every rank and reply to prompts; a rank function for `run_ranks`.

    Args:
        place: see `opening.find`.
        prompts: one user message each.
        options: how.
        context: see `opening.find`.
        mask: see `opening.find`.
        arithmetic: see `Found.open`.
        device: where to compute.
        stop: after a stop signal no further prompt is begun.

    Returns:
        The replies in order, the same on every rank; where stopped, those before the first that was not
        begun.
    """
    with fail_together():
        found = find(place, mask, context)
        asked = [prompt_ids(found.tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    decoder = found.open(device, arithmetic)
    with stop.finishing("the replies under way are the last ones", is_last=True):
        return decode_over_ranks(decoder, asked, options, stop=stop)


def decode_over_ranks(
    decoder: Decoder, prompts: Sequence[Sequence[int]], options: Decoding, stop: StopFlag | None = None
) -> list[Reply]:
    """Reply to prompts, each on one of the ranks. All ranks call it together, with the same arguments.

    A reply does not depend on the number of ranks: under `reference`, where prompts of a batch are padded
    together, whole batches are given out.

    Args:
        decoder: on this rank; the models of all ranks are equal.
        prompts: all of them.
        options: how.
        stop: after a stop signal on a rank, that rank begins no further prompt.

    Returns:
        As `answer_prompts`.

    Raises:
        TideError: what one of the ranks raised, on all of them.
    """
    rank, ranks = own_share()
    run = options.batch if options.schedule == "reference" else 1
    own = [number for number in range(len(prompts)) if number // run % ranks == rank]
    with fail_together():
        replies = decoder.decode([prompts[number] for number in own], options, numbers=own, stop=stop)
    found = dict[int, Reply]()
    for numbered in gather_objects(list(zip(own, replies, strict=False))):
        found |= dict(numbered)
    begun = next((number for number in range(len(prompts)) if number not in found), len(prompts))
    return [found[number] for number in range(begun)]
