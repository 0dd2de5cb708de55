"""Held-out scores at fixed noises: NLL per byte of reply and masked accuracy, by noise level.

For every sample and every noise level t the same tokens are masked in every evaluation of every run (the
noise is keyed by the evaluation seed, not by the run's), so two runs can be compared sample by sample. The
NLL at level t is the sum over masked tokens divided by t, the integrand of the diffusion bound with linear
schedule (spec section 1 item 7); its mean over the levels is an estimate of the bound. The bound depends on
what a masked token may attend to, so it is labelled by the model's context kind.

Left out: scores of sampled text (`decode` makes it, `tasks` judges it).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.base.heartbeat import HEARTBEAT
from tide_megatron.base.segments import segment_sums
from tide_megatron.base.stop import StopFlag
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import trimmed_view
from tide_megatron.evaluate.calibration import TEMPERATURES, Calibration
from tide_megatron.evaluate.model_folder import open_model
from tide_megatron.evaluate.options import Arithmetic, Evaluation
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.tiles import RowScores, score_rows
from tide_megatron.models.build import TideModel
from tide_megatron.parallel.collectives import fail_together, own_share, sum_over
from tide_megatron.parallel.layout import Layout
from tide_megatron.text.tokenizer import Tokenizer

EVALUATION_SEED = 20260426
"""Seed of all evaluation noise; fixed so that figures of different runs are paired."""
CANDIDATES = 2**20
"""Of data with more samples, about so many, evenly spread, are those that some are drawn from."""


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
    samples: Sequence[int]
    """[samples]: which of the data they are."""
    sources: Sequence[str]
    """[samples]: where each one comes from."""
    calibration: Calibration | None = None
    """Where the options ask for it."""

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

    def by_source(self) -> list[dict[str, Any]]:
        """List samples, NLL per byte and accuracy of each source, in the order of their names."""
        sample_nll, found = self.sample_nll, []
        for name in sorted(set(self.sources)):
            own = torch.tensor([source == name for source in self.sources])
            found.append(
                {
                    "source": name,
                    "samples": int(own.sum()),
                    "nll_per_byte": float(sample_nll[own].sum() / self.reply_bytes[own].sum()),
                    "masked_accuracy": float(self.correct[own].sum() / self.masked[own].sum().clamp_min(1)),
                }
            )
        return found

    def summary(self) -> dict[str, Any]:
        """Return plain values for a result file.

        `sample_nll_per_byte` is what pairs two runs that scored the same `sample_ids`.
        """
        share = self.sample_nll / self.reply_bytes.mean()
        return {
            "context": self.context,
            "samples": len(self.reply_bytes),
            "nll_per_byte": self.nll_per_byte,
            "masked_accuracy": self.masked_accuracy,
            **(self.calibration.summary(self.reply_bytes) if self.calibration else {}),
            "by_time": self.by_time(),
            "by_source": self.by_source(),
            "sample_ids": list(self.samples),
            "sample_nll_per_byte": [float(value) for value in share],
        }


class Scorer(Protocol):
    """Whatever can say how likely it finds the masked tokens of a microbatch."""

    def __call__(self, noised: Noised) -> RowScores:
        """Score a microbatch. All ranks call it together and equally often."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelScorer:
    """A whole model on this rank, student or folder; experts may lie on other ranks."""

    model: TideModel
    context: Context
    """What its tokens may attend to."""
    mask_id: int
    calibration: bool = False
    """Also score at every temperature."""

    def __call__(self, noised: Noised) -> RowScores:
        """Score one microbatch; see `Scorer`."""
        hidden = self.model.rows(trimmed_view(noised, self.context, self.mask_id))
        head = HeadInput(hidden=hidden, weight=self.model.head_weight)
        gold = noised.batch.ids[noised.row_index]
        return score_rows(head, gold, temperatures=TEMPERATURES if self.calibration else ())


@torch.no_grad()
def evaluate(
    scorer: Scorer, context: Context, loader: Loader, options: Evaluation, device: torch.device
) -> Likelihood:
    """Score a model on a fixed draw of held-out samples. All ranks call it together.

    Every rank forwards equally many microbatches (a model whose parts lie on other ranks needs
    that); a rank that runs out of samples forwards the first one again and leaves it out of the sums.

    Args:
        scorer: the model, in evaluation mode.
        context: what its tokens may attend to; labels the bound.
        loader: held-out data; it knows this rank's shard.
        options: how much, and at which noise levels.
        device: where the scorer computes.
    """
    loader = dataclasses.replace(loader, sides={}, taught={})  # nobody but the model that is scored reads
    drawn, sources = drawn_samples(loader, options.samples)
    shard, microbatch = loader.shard, options.microbatch
    sums = torch.zeros(4, len(drawn), len(options.times), dtype=torch.float64, device=device)
    calibration = Calibration.empty(len(drawn), device) if options.calibration else None
    for step in range(math.ceil(len(drawn) / (microbatch * shard.size))):
        HEARTBEAT.beat("evaluate")
        first = (step * shard.size + shard.rank) * microbatch
        mine = list(range(first, min(first + microbatch, len(drawn))))
        batch = loader.batch_of([drawn[place] for place in mine or [0]]).to(device)
        for column, time in enumerate(options.times):
            noised = Noiser(seed=EVALUATION_SEED, stream_suffix=f"@{time}").at(batch, time)
            scores = scorer(noised)
            if not mine:
                continue
            sample, _ = noised.row_index
            values = torch.zeros(3, len(mine), dtype=torch.float64, device=device)
            scored = torch.stack([scores.nll.double(), scores.is_right.double()], dim=1)
            values[:2] = segment_sums(scored, sample, len(mine)).T
            values[2] += noised.masked.sum(dim=1)
            sums[:3, mine, column] = values
            if calibration is not None:
                assert scores.tempered is not None, "the scorer was not asked for calibration"
                share = scores.tempered.nll / (time * len(options.times))
                calibration.add(sample + first, share, scores.tempered.confidence, scores.is_right)
        if mine:
            sums[3, mine, :] = batch.reply_bytes.double()[:, None]
    repeats = own_share()[1] // shard.size  # the ranks of a replica add the same
    sums = sum_over(sums).cpu() / repeats
    if calibration is not None:
        nll, bins = (sum_over(part).cpu() / repeats for part in (calibration.nll, calibration.bins))
        calibration = Calibration(nll=nll, bins=bins)
    return Likelihood(
        context=context.kind,
        times=tuple(options.times),
        nll=sums[0],
        correct=sums[1],
        masked=sums[2],
        reply_bytes=sums[3, :, 0],
        samples=drawn,
        sources=sources,
        calibration=calibration,
    )


def drawn_samples(loader: Loader, samples: int) -> tuple[list[int], list[str]]:
    """Return which samples are scored, and the source of each."""
    candidates = loader.columns.spread(CANDIDATES, loader.main)
    names, numbers = loader.columns.sources_of(candidates)
    places = scored_samples(numbers, samples)
    return candidates[places].tolist(), [names[numbers[place]] for place in places]


def scored_samples(sources: NDArray[numpy.int64], samples: int) -> list[int]:
    """Return which samples are scored: the beginning of one fixed order, stratified over sources.

    A file's first rows are rarely like the rest of it: files are sorted, or put together source by source.
    Here each source is shuffled, and its k-th sample of n stands at (k + u) / n of the order, with u drawn
    for the source. So every beginning of the order has of each source its share, to within a sample or so,
    and a larger draw contains a smaller one.

    Args:
        sources: [samples of the data] number of each one's source.
        samples: how many are wanted; all, where there are fewer.
    """
    places = numpy.empty(len(sources))
    for source in numpy.unique(sources):
        members = numpy.flatnonzero(sources == source)
        # The raw stream is the part of numpy.random that is promised to stay the same (NEP 19).
        draws = numpy.random.Philox(key=[EVALUATION_SEED, int(source)]).random_raw(len(members) + 1)
        shift = float(draws[-1]) / 2.0**64
        places[members[numpy.argsort(draws[:-1], kind="stable")]] = (
            numpy.arange(len(members)) + shift
        ) / len(members)
    return [int(sample) for sample in numpy.argsort(places, kind="stable")[:samples]]


def score_folder(
    folder: Path,
    data: Path,
    context: Context,
    options: Evaluation,
    arithmetic: Arithmetic | None = None,
    *,
    device: Device,
    stop: StopFlag,
) -> dict[str, Any]:
    """Score a model folder, a teacher's or a shipped model's; a rank function for `launch.run_ranks`.

    Every rank holds the whole model and scores its own part of the data. All ranks call it together.

    Args:
        folder: config.json, safetensors and tokenizer.
        data: prepared with this tokenizer and template.
        context: what the model's tokens may attend to.
        options: how much, and at which noise levels.
        arithmetic: see `open_model`.
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
            columns=PreparedData(data, tokenizer=tokenizer),
            samples=options.microbatch,
            shard=Layout().data_shard(*own_share()),
            block_size=1 if context.kind == "bidirectional" else context.block_size,
        )
    model = open_model(folder, device, arithmetic)
    scorer = ModelScorer(
        model=model, context=context, mask_id=tokenizer.mask_id, calibration=options.calibration
    )
    return evaluate(scorer, context, loader, options, device.torch_device).summary()
