"""Score a model folder on a prepared data folder: a result table's line for a teacher or a shipped model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.data.columns import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.likelihood import Levels, ModelScorer, evaluate
from tide_megatron.evaluate.replies import open_model
from tide_megatron.parallel.collectives import fail_together, own_share
from tide_megatron.parallel.layout import Layout
from tide_megatron.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What to score a model on."""

    data: Path
    context: Context
    samples: int = 256
    times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    microbatch: int = 16


def score_folder(folder: Path, question: Question, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Load a model on every rank and score it; a rank function for `launch.run_ranks`. All ranks call it.

    Returns:
        `Likelihood.summary()`.

    Raises:
        TideError: a folder is missing or damaged, or the data was made with another tokenizer.
    """
    context = question.context
    with fail_together():
        tokenizer = Tokenizer.load(folder)
        loader = Loader(
            columns=PreparedData(question.data, tokenizer_digest=tokenizer.digest),
            samples=question.microbatch,
            shard=Layout().data_shard(*own_share()),
            block_size=1 if context.kind == "bidirectional" else context.block_size,
        )
    model = open_model(folder, device)
    levels = Levels(times=question.times, samples=question.samples, microbatch=question.microbatch)
    scorer = ModelScorer(model=model, context=context, mask_id=tokenizer.mask_id)
    scores = evaluate(scorer, context, loader, levels, device.torch_device)
    return scores.summary()
