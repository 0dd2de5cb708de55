"""Replies of a model: to prompts, and in a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tide_megatron.api.checks import LONGEST_WAIT_SECONDS, arithmetic_of, checked
from tide_megatron.api.data import Place
from tide_megatron.base.files import local_path

if TYPE_CHECKING:
    from tide_megatron.base.device import Wanted
    from tide_megatron.decode.conversations import Conversation
    from tide_megatron.decode.options import Decoding
    from tide_megatron.diffusion.mask import Context
    from tide_megatron.tasks.sampling import Sampled

ContextWord = Literal["bidirectional", "block_causal", "block_diffusion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplyOptions:
    """How a model replies (docs/decoding.md); the command line has an option of each field."""

    new_tokens: Annotated[int, "Longest reply, in tokens."] = 256
    steps: Annotated[int | None, "Denoising steps for so many; default: one a token."] = None
    schedule: Annotated[
        Literal["count", "reference", "confidence", "entropy"],
        "What a step commits: a count, or all that is sure enough (docs/decoding.md).",
    ] = "count"
    threshold: Annotated[float | None, "How sure: of confidence (default 0.9) or entropy (0.1)."] = None
    temperature: Annotated[float, "0: the likeliest token; else draws."] = 0.0
    top_p: Annotated[float, "Draw from the likeliest tokens of so much probability."] = 1.0
    guidance: Annotated[float, "Weight of classifier-free guidance; doubles the work."] = 0.0
    stop: Annotated[list[str], "Text that ends a reply; may be given several times."] = dataclasses.field(
        default_factory=list
    )
    seed: Annotated[int, "Of draws."] = 0
    batch: Annotated[int, "Replies under way at a time on a rank."] = 16
    cache: Annotated[bool, "Keep keys and values of finished blocks."] = True
    system: Annotated[str | None, "System prompt, where a conversation has none."] = None
    mask: Annotated[str | None, "The mask token it was trained with; default: its folder's."] = None

    def decoding(self) -> Decoding:
        """Return how replies are decoded.

        Raises:
            ConfigError: a value that cannot be, naming its option.
        """
        from tide_megatron.decode.options import Decoding

        names = [field.name for field in dataclasses.fields(Decoding)]
        return checked(Decoding, {name: getattr(self, name) for name in names} | {"stop": tuple(self.stop)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(ReplyOptions):
    """How prompts are answered, and where they and the replies stand."""

    input: Annotated[Path | None, 'JSON lines with "prompt" or "messages", in the place of prompts.'] = None
    out: Annotated[Path | None, "JSONL file of replies; the same command goes on after a kill."] = None
    replay: Annotated[Path | None, "HTML page to write, which replays how replies were denoised."] = None

    def conversations(self, prompts: Sequence[str]) -> list[Conversation]:
        """Return what is asked.

        Args:
            prompts: user messages.

        Raises:
            TideError: neither prompts nor an input, both, or one that is no text.
        """
        from tide_megatron.base.errors import ConfigError, DataError
        from tide_megatron.base.read import is_text
        from tide_megatron.decode.conversations import conversation, read_conversations

        if (self.input is not None) == bool(prompts):
            both = "prompts and --input: give one of them" if prompts else "prompts: there are none"
            raise ConfigError(f"{both}; words, lines of stdin, or --input prompts.jsonl")
        if self.input is not None:
            return read_conversations(local_path(self.input), self.system)
        for number, prompt in enumerate(prompts, start=1):
            if not is_text(prompt):
                raise DataError(f"prompts: number {number} is no UTF-8 text: {prompt!a}")
        return [conversation(prompt, self.system) for prompt in prompts]


def sample(
    model: Place,
    prompts: Sequence[str] = (),
    *,
    options: SampleOptions | None = None,
    new_tokens: int | None = None,
    steps: int | None = None,
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
        model: a run's folder, one of its checkpoints, or a model folder with weights and tokenizer.
        prompts: each is one user message in the model's chat template.
        options: how, and files of prompts and replies; None: as its defaults say.
        new_tokens: longest reply, in tokens; None: as `options` says.
        steps: denoising steps of a reply; None: as `options` says.
        context: the kind of context that the model was trained in; None: its folder's.
        block_size: tokens of a block that it was trained with; None: its folder's.
        ranks: processes to start here, each with the whole model; None: what torchrun or srun started.
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
    given = {"new_tokens": new_tokens, "steps": steps}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    wanted = dataclasses.replace(options or SampleOptions(), **chosen)
    opened = Opened(model, arithmetic_of(precision, engine, fp8), context, block_size, ranks, device)
    return [one.reply.text for one in opened.sample(prompts, wanted)]


def chat(
    model: Place,
    *,
    options: ReplyOptions | None = None,
    show_order: bool = False,
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
        options: how it replies; None: as its defaults say.
        show_order: show each reply once more in the colours of the order in which it was committed.
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
    opened = Opened(model, arithmetic_of(precision, engine, fp8), context, block_size, 1, device)
    opened.chat(options or ReplyOptions(), show_order=show_order)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model, how it computes, and the ranks that are started for it."""

    model: Place
    arithmetic: Any
    context: ContextWord | None
    block_size: int | None
    ranks: int | None
    device: Wanted

    def _read_in(self) -> Context | None:
        """Return the context that was asked for; None: the model's own."""
        from tide_megatron.decode.opening import found_at
        from tide_megatron.evaluate.model_folder import trained_context

        if self.context is None and self.block_size is None:
            return None
        return trained_context(found_at(local_path(self.model)), self.context, self.block_size)

    def sample(self, prompts: Sequence[str], options: SampleOptions) -> list[Sampled]:
        """Answer prompts as `api.sample` does; each reply with its conversation and the order of its tokens.

        Args:
            prompts: user messages.
            options: how.

        Raises:
            TideError: as it does.
        """
        from tide_megatron.base.disk import disk_faults
        from tide_megatron.base.errors import ConfigError
        from tide_megatron.base.files import write_text
        from tide_megatron.decode.replay_page import render
        from tide_megatron.launch.ranks import run_ranks
        from tide_megatron.parallel.collectives import is_first
        from tide_megatron.tasks.sampling import Sampling, sample_conversations

        out = None if options.out is None else local_path(options.out)
        asked, decoding = options.conversations(prompts), options.decoding()
        work = Sampling(conversations=asked, options=decoding, out=out)
        args = (local_path(self.model), work, self._read_in(), options.mask, self.arithmetic)
        sampled: list[Sampled] = run_ranks(
            sample_conversations, args, self.ranks, self.device, timeout_seconds=LONGEST_WAIT_SECONDS
        )
        if options.replay is not None and is_first():
            page = local_path(options.replay)
            with disk_faults(page, ConfigError):
                write_text(page, render(str(self.model), sampled, decoding), is_durable=False)
        return sampled

    def chat(self, options: ReplyOptions, *, show_order: bool) -> None:
        """Talk, as `api.chat` does."""
        from tide_megatron.decode.terminal import Talk, talk
        from tide_megatron.launch.ranks import run_ranks

        wanted = Talk(options=options.decoding(), system=options.system, show_order=show_order)
        args = (local_path(self.model), wanted, self._read_in(), options.mask, self.arithmetic)
        run_ranks(talk, args, 1, self.device)
