"""Let a model folder answer prompts: load, render the chat template, sample, decode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.stop import StopFlag
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.generate import Sampler, generate
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import load_model, read_architecture
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.text.tokenizer import Tokenizer


def answer_prompts(
    folder: Path,
    prompts: Sequence[str],
    context: Context,
    sampler: Sampler,
    *,
    device: Device,
    stop: StopFlag,
) -> list[str]:
    """Load a model on this rank and answer prompts one after the other; a rank function for `run_ranks`.

    Args:
        folder: config.json, safetensors and tokenizer.json with a chat template.
        prompts: one user message each.
        context: the model's training context.
        sampler: length and steps.
        device: where to compute.
        stop: after a stop signal no further prompt is begun.

    Returns:
        The replies; fewer than prompts when stopped.
    """
    tokenizer = Tokenizer.load(folder)
    model = open_model(folder, device)
    if tokenizer.vocabulary_size > model.architecture.vocabulary:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.vocabulary_size} ids, its model "
            f"{model.architecture.vocabulary} rows; give the tokenizer and mask token it was trained with"
        )
    replies = []
    for prompt in prompts:
        if stop.requested:
            break
        replies.append(reply_to(model, tokenizer, prompt, context, sampler))
    return replies


def open_model(folder: Path, device: Device) -> TideModel:
    """Build a frozen model whole on this rank and load it. All ranks of the world call it together."""
    layout = Layout()
    options = ModelOptions(device=device, layout=layout, precision=Precision.on("auto", device))
    model = build_model(read_architecture(folder), make_groups(layout), options)
    load_model(model, folder)
    return model


def reply_to(model: TideModel, tokenizer: Tokenizer, prompt: str, context: Context, sampler: Sampler) -> str:
    """Return one reply as text.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if tokenizer.chat is None:
        raise DataError(
            f"{tokenizer.name} has no chat template: add chat_template.jinja beside tokenizer.json"
        )
    asked = tokenizer.chat.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = generate(
        model,
        context,
        tokenizer.encode(asked),
        sampler,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
    )
    return tokenizer.decode(ids)
