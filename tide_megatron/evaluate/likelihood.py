"""Held-out scores at fixed noises: NLL per byte of reply and masked accuracy, by noise level.

For every sample and every noise level t the same tokens are masked in every evaluation of every run (the
noise is keyed by the evaluation seed, not by the run's), so two runs can be compared sample by sample. The
NLL at level t is the sum over masked tokens divided by t, the integrand of the diffusion bound with linear
schedule (spec section 1 item 7); its mean over the levels is an estimate of the bound. The bound depends on
what a masked token may attend to, so it is labelled by the model's context kind.

Left out: sampling-based scores (`generate.py` makes text; benchmarks come later).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.data.columns import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import trimmed_view
from tide_megatron.evaluate.model_folder import open_model
from tide_megatron.evaluate.options import Evaluation
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.tiles import score_rows
from tide_megatron.models.build import TideModel
from tide_megatron.parallel.collectives import fail_together, own_share, sum_over
from tide_megatron.parallel.layout import Layout
from tide_megatron.text.tokenizer import Tokenizer

EVALUATION_SEED = 20260426
"""Seed of all evaluation noise; fixed so that figures of different runs are paired."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Sums per sample and noise level; everything else is derived from them."""

    context: str
    """Context kind that labels the bound."""
    times: tuple[float, ...]
    nll: Tensor
    """[samples, times] fp64: summed NLL of masked tokens, in nats."""
    correct: Tensor
    """[samples, times] fp64: masked tokens whose most likely token is the gold one."""
    masked: Tensor
    """[samples, times] fp64: masked tokens."""
    reply_bytes: Tensor
    """[samples] fp64."""

    @property
    def sample_nll(self) -> Tensor:
        """[samples] fp64: bound of each sample in nats, the mean over levels of NLL / t."""
        return (self.nll / torch.tensor(self.times, dtype=torch.float64)).mean(dim=1)

    @property
    def nll_per_byte(self) -> float:
        """Nats per byte of reply text."""
        return float(self.sample_nll.sum() / self.reply_bytes.sum())

    @property
    def masked_accuracy(self) -> float:
        """Share of masked tokens predicted right, over all options."""
        return float(self.correct.sum() / self.masked.sum().clamp_min(1))

    def by_time(self) -> list[dict[str, float]]:
        """List NLL per byte, NLL per masked token and accuracy at each noise level."""
        total_bytes = float(self.reply_bytes.sum())
        return [
            {
                "time": time,
                "nll_per_byte": float(self.nll[:, index].sum()) / time / total_bytes,
                "nll_per_token": float(self.nll[:, index].sum() / self.masked[:, index].sum().clamp_min(1)),
                "masked_accuracy": float(
                    self.correct[:, index].sum() / self.masked[:, index].sum().clamp_min(1)
                ),
            }
            for index, time in enumerate(self.times)
        ]

    def summary(self) -> dict[str, Any]:
        """Return plain values for a result file; `sample_nll_per_byte` is what pairs two runs."""
        share = self.sample_nll / self.reply_bytes.mean()
        return {
            "context": self.context,
            "samples": len(self.reply_bytes),
            "nll_per_byte": self.nll_per_byte,
            "masked_accuracy": self.masked_accuracy,
            "by_time": self.by_time(),
            "sample_nll_per_byte": [float(value) for value in share],
        }


class Scorer(Protocol):
    """Whatever can say how likely it finds the masked tokens of a microbatch."""

    def __call__(self, noised: Noised) -> tuple[Tensor, Tensor]:
        """Return NLL in nats [rows] and whether the gold token is the most likely [rows], in row order.

        All ranks call it together and equally often.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelScorer:
    """A whole model on this rank, student or folder; experts may lie on other ranks."""

    model: TideModel
    context: Context
    """What its tokens may attend to."""
    mask_id: int

    def __call__(self, noised: Noised) -> tuple[Tensor, Tensor]:
        """Score one microbatch; see `Scorer`."""
        hidden = self.model.rows(trimmed_view(noised, self.context, self.mask_id))
        sample, position = noised.row_index
        head = HeadInput(hidden=hidden, weight=self.model.head_weight)
        return score_rows(head, noised.batch.ids[sample, position])


@torch.no_grad()
def evaluate(
    scorer: Scorer, context: Context, loader: Loader, options: Evaluation, device: torch.device
) -> Likelihood:
    """Score a model on the first held-out samples. All ranks call it together.

    Every rank forwards equally many microbatches (a model whose parts lie on other ranks needs
    that); a rank that runs out of samples forwards the first one again and leaves it out of the sums.

    Args:
        scorer: the model, in evaluation mode.
        context: what its tokens may attend to; labels the bound.
        loader: held-out data; it knows this rank's shard.
        options: how much, and at which noise options.
        device: where the scorer computes.
    """
    loader = dataclasses.replace(loader, sides={})  # one model is scored: nobody else's tokens are needed
    shard, samples, microbatch = loader.shard, min(options.samples, loader.num_samples), options.microbatch
    sums = torch.zeros(4, samples, len(options.times), dtype=torch.float64, device=device)
    for step in range(math.ceil(samples / (microbatch * shard.size))):
        first = (step * shard.size + shard.rank) * microbatch
        mine = [index for index in range(first, first + microbatch) if index < samples]
        batch = loader.batch_of(mine or [0]).to(device)
        for column, time in enumerate(options.times):
            noised = Noiser(seed=EVALUATION_SEED, stream_suffix=f"@{time}").at(batch, time)
            nll, is_right = scorer(noised)
            sample, _ = noised.row_index
            values = torch.zeros(3, len(batch.sample_ids), dtype=torch.float64, device=device)
            values[0].index_add_(0, sample, nll.double())
            values[1].index_add_(0, sample, is_right.double())
            values[2] += noised.masked.sum(dim=1)
            if mine:
                sums[:3, mine, column] = values
        if mine:
            sums[3, mine, :] = batch.reply_bytes.double()[:, None]
    sums = sum_over(sums).cpu() / (own_share()[1] // shard.size)  # the ranks of a replica add the same
    return Likelihood(
        context=context.kind,
        times=tuple(options.times),
        nll=sums[0],
        correct=sums[1],
        masked=sums[2],
        reply_bytes=sums[3, :, 0],
    )


def score_folder(
    folder: Path, data: Path, context: Context, options: Evaluation, *, device: Device, stop: StopFlag
) -> dict[str, Any]:
    """Score a model folder, a teacher's or a shipped model's; a rank function for `launch.run_ranks`.

    Every rank holds the whole model and scores its own part of the data. All ranks call it together.

    Args:
        folder: config.json, safetensors and tokenizer.
        data: prepared with this tokenizer and template.
        context: what the model's tokens may attend to.
        options: how much, and at which noise levels.
        device: where to compute.
        stop: not looked at.

    Returns:
        `Likelihood.summary()`.

    Raises:
        TideError: a folder is missing or damaged, or the data was made with another tokenizer.
    """
    with fail_together():
        tokenizer = Tokenizer.load(folder)
        loader = Loader(
            columns=PreparedData(data, tokenizer_digest=tokenizer.digest),
            samples=options.microbatch,
            shard=Layout().data_shard(*own_share()),
            block_size=1 if context.kind == "bidirectional" else context.block_size,
        )
    scorer = ModelScorer(model=open_model(folder, device), context=context, mask_id=tokenizer.mask_id)
    return evaluate(scorer, context, loader, options, device.torch_device).summary()
