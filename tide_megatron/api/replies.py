"""The public functions that let a model write; `tide_megatron.api` has them, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tide_megatron.api.checks import LONGEST_WAIT_SECONDS, arithmetic_of, checked
from tide_megatron.api.data import Place
from tide_megatron.base.files import local_path

if TYPE_CHECKING:
    from tide_megatron.base.device import Wanted
    from tide_megatron.decode.options import ScheduleWord
    from tide_megatron.diffusion.mask import Context
    from tide_megatron.tasks.sampling import Sampled

ContextWord = Literal["bidirectional", "block_causal", "block_diffusion"]


def sample(
    model: Place,
    prompts: Sequence[str] = (),
    *,
    input_file: Place | None = None,
    system: str | None = None,
    out: Place | None = None,
    replay: Place | None = None,
    mask: str | None = None,
    new_tokens: int = 256,
    steps: int | None = None,
    schedule: ScheduleWord = "count",
    threshold: float | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    guidance: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch: int = 16,
    cache: bool = True,
    context: ContextWord | None = None,
    block_size: int | None = None,
    ranks: int | None = None,
    device: Wanted = "auto",
    precision: str = "auto",
    engine: str = "auto",
    fp8: str | None = None,
) -> list[str]:
    """Answer prompts.

    Args:
        model: a run's folder, one of its checkpoints, or a model folder with config.json, weights and
            tokenizer.
        prompts: each is one user message in the model's chat template.
        input_file: in their place: JSON lines with `prompt` or `messages`, and perhaps `id` (docs/chat.md).
        system: prompt before conversations that have none; None: none.
        out: JSONL file of replies, written as they come: the same call goes on after a kill, and reads a file
            that is whole.
        replay: HTML file to write, which replays the order in which tokens were committed.
        mask: the mask token that it was trained with; None: the one its folder names.
        new_tokens: longest reply, in tokens; as the following ones see `decode.options.Decoding`.
        steps: denoising steps of a reply; None: one a token.
        schedule: what a step commits: `count`, `reference`, `confidence` or `entropy`.
        threshold: of the last two; None: 0.9 and 0.1.
        temperature: 0: the likeliest token.
        top_p: draw from the likeliest tokens that have so much probability together.
        guidance: weight of classifier-free guidance.
        stop: texts that end a reply.
        seed: of draws.
        batch: replies under way at a time on a rank.
        cache: keep keys and values of finished blocks.
        context: the kind of context that the model was trained in; None: its folder's.
        block_size: tokens of a block that it was trained with; None: its folder's.
        ranks: processes to start here, each with the whole model; None: what torchrun or srun started, else
            one.
        device: where to compute; `auto` takes CUDA where it works.
        precision: `fp32`, `bf16` or `auto` (bf16 on CUDA, fp32 on CPU).
        engine: what computes the layers, as a teacher's `engine` in a recipe.
        fp8: hold and multiply the layers' matrices in FP8 by this recipe (docs/precision.md); None: do not.

    Returns:
        A reply to each prompt; fewer when a signal stopped it.

    Raises:
        TideError: a model that cannot be read, or whose context or mask token nobody says; a prompt that
            holds the mask token, is no text or fills the model's window; an `out` of another work.
    """
    decoding = {
        "new_tokens": new_tokens,
        "steps": steps,
        "schedule": schedule,
        "threshold": threshold,
        "temperature": temperature,
        "top_p": top_p,
        "guidance": guidance,
        "stop": tuple(stop),
        "seed": seed,
        "batch": batch,
        "cache": cache,
    }
    sampled = sample_whole(
        model,
        prompts,
        decoding,
        input_file=input_file,
        system=system,
        out=out,
        replay=replay,
        mask=mask,
        context=context,
        block_size=block_size,
        ranks=ranks,
        device=device,
        precision=precision,
        engine=engine,
        fp8=fp8,
    )
    return [one.reply.text for one in sampled]


def sample_whole(
    model: Place,
    prompts: Sequence[str],
    decoding: Mapping[str, Any],
    *,
    input_file: Place | None = None,
    system: str | None = None,
    out: Place | None = None,
    replay: Place | None = None,
    mask: str | None = None,
    context: ContextWord | None = None,
    block_size: int | None = None,
    ranks: int | None = None,
    device: Wanted = "auto",
    precision: str = "auto",
    engine: str = "auto",
    fp8: str | None = None,
) -> list[Sampled]:
    """Answer prompts as `sample` does; return each reply with its conversation and the order of its tokens.

    Args:
        model: as the others see `sample`.
        prompts: user messages.
        decoding: options of `decode.options.Decoding`.
        input_file: in their place.
        system: prompt.
        out: JSONL file.
        replay: HTML file.
        mask: token.
        context: kind.
        block_size: tokens.
        ranks: processes.
        device: where.
        precision: of what is computed.
        engine: of the layers.
        fp8: recipe.

    Returns:
        The replies, with `reply` (decode.reply.Reply), `messages` and `cells` (decode.order.Cell).

    Raises:
        TideError: as `sample`.
    """
    from tide_megatron.base.disk import disk_faults
    from tide_megatron.base.errors import ConfigError, DataError
    from tide_megatron.base.files import write_text
    from tide_megatron.base.read import is_text
    from tide_megatron.decode.conversations import conversation, read_conversations
    from tide_megatron.decode.options import Decoding
    from tide_megatron.decode.replay import render
    from tide_megatron.launch.ranks import run_ranks
    from tide_megatron.parallel.collectives import is_first
    from tide_megatron.tasks.sampling import Sampling, sample_conversations

    if (input_file is not None) == bool(prompts):
        both = "prompts and --input: give one of them" if prompts else "prompts: there are none"
        raise ConfigError(f"{both}; words, lines of stdin, or --input prompts.jsonl")
    for number, prompt in enumerate(prompts, start=1):
        if not is_text(prompt):
            raise DataError(f"prompts: number {number} is no UTF-8 text: {prompt!a}")
    if input_file is None:
        asked = [conversation(prompt, system) for prompt in prompts]
    else:
        asked = read_conversations(local_path(input_file), system)
    options = checked(Decoding, **decoding)
    target = None if out is None else local_path(out)
    place, reading = local_path(model), _reading(local_path(model), context, block_size)
    sampled: list[Sampled] = run_ranks(
        sample_conversations,
        (
            place,
            Sampling(conversations=asked, options=options, out=target),
            reading,
            mask,
            arithmetic_of(precision, engine, fp8),
        ),
        ranks,
        device,
        timeout_seconds=LONGEST_WAIT_SECONDS,
    )
    if replay is not None and is_first():
        with disk_faults(local_path(replay), ConfigError):
            page = render(str(model), sampled, options)
            write_text(local_path(replay), page, is_durable=False)
    return sampled


def chat(
    model: Place,
    decoding: Mapping[str, Any] | None = None,
    *,
    system: str | None = None,
    show_order: bool = False,
    mask: str | None = None,
    context: ContextWord | None = None,
    block_size: int | None = None,
    device: Wanted = "auto",
    precision: str = "auto",
    engine: str = "auto",
    fp8: str | None = None,
) -> None:
    """Talk with a model: messages from stdin, replies to stdout, until stdin ends or says /quit.

    Args:
        model: as the others see `sample`.
        decoding: options of `decode.options.Decoding`.
        system: prompt; None: none.
        show_order: show each reply once more in the colours of the order in which it was committed.
        mask: token.
        context: kind.
        block_size: tokens.
        device: where.
        precision: of what is computed.
        engine: of the layers.
        fp8: recipe.

    Returns:
        Nothing: replies were printed.

    Raises:
        TideError: a model that cannot be read, or has no chat template.
    """
    from tide_megatron.decode.options import Decoding
    from tide_megatron.decode.talk import Talk, talk
    from tide_megatron.launch.ranks import run_ranks

    wanted = Talk(options=checked(Decoding, **(decoding or {})), system=system, show_order=show_order)
    place = local_path(model)
    reading = _reading(place, context, block_size)
    run_ranks(talk, (place, wanted, reading, mask, arithmetic_of(precision, engine, fp8)), 1, device)


def _reading(place: Path, context: ContextWord | None, block_size: int | None) -> Context | None:
    """Return the context that was asked for; None: the model's own."""
    from tide_megatron.decode.opening import found_at
    from tide_megatron.evaluate.model_folder import trained_context

    if context is None and block_size is None:
        return None
    return trained_context(found_at(place), context, block_size)
