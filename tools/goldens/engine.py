"""The package as the replays of formulas and steps see it: diffusion, head and losses enter here alone.

Draws, masks and alignments are injected, so sample ids, seeds and files do not matter. Logits enter as rows
under an identity head. Options that a file leaves out have our defaults, which are the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from goldens.dense import gold_log_likelihood
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.alignment import TeacherTokens
from tide_megatron.diffusion.batch import IGNORED, Batch, Noised
from tide_megatron.diffusion.mask import Context, dense_mask
from tide_megatron.diffusion.noise import NoiseOptions, Noiser
from tide_megatron.diffusion.segments import Segments
from tide_megatron.diffusion.views import (
    Complementary,
    View,
    complementary_passes,
    complementary_view,
    plain_view,
    teacher_view,
)
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput, HeadResult
from tide_megatron.head.loss import HeadLoss
from tide_megatron.head.options import HeadOptions
from tide_megatron.losses.base import Loss
from tide_megatron.losses.calm import (
    LIKELIHOOD_EPSILON,
    Bernoulli,
    Calm,
    CalmTidal,
    ChunkLikelihood,
    ReverseCalm,
    ReverseCalmTidal,
    chunk_log_likelihoods,
)
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.kl import Kl, ReverseKl
from tide_megatron.losses.rows import Rows, rows_of
from tide_megatron.losses.tidal import Mixture, Tidal

TEACHER = "golden"
"""What the teacher of every file is called."""
EVERYBODY = Context(kind="bidirectional")
LOGIT_LOSSES: dict[str, Any] = {"kl": Kl, "reverse_kl": ReverseKl, "taid": Tidal}
TIDAL_OPTIONS = {
    "axis_mode": "axes",
    "lambda_decay": "growth",
    "timestep_weight": "timestep_weight",
    "temperature": "temperature",
    "shared_vocab_size": "shared_vocab_size",
    "lambda_init": "initial",
    "lambda_max": "maximum",
}
"""Option of a case of taid.npz -> our field."""


def recorded_likelihood(log_likelihood: Tensor, temperature: float) -> Bernoulli:
    """Return a chunk's likelihood in the reference's form: 1 - p is taken from p, rounded to fp32."""
    p = torch.exp(log_likelihood / temperature).clamp(LIKELIHOOD_EPSILON, 1 - LIKELIHOOD_EPSILON)
    return Bernoulli(p, 1 - p, p.log(), (1 - p).log())


class _Recorded(ChunkLikelihood):
    """A chunk loss in the reference's form, which also takes a chunk without teacher tokens as certain."""

    def likelihoods(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> tuple[Bernoulli, Bernoulli]:
        """Return each side's; see `ChunkLikelihood.likelihoods`."""
        assert teacher is not None, "a chunk loss has a teacher"
        link = rows.link(self.teacher)
        ours, theirs = (
            recorded_likelihood(chunk_log_likelihoods(tokens, *members, link.num_chunks), self.temperature)
            for tokens, members in ((student, link.student_rows), (teacher, link.teacher_rows))
        )
        return ours, theirs


class _Calm(_Recorded, Calm):
    pass


class _ReverseCalm(_Recorded, ReverseCalm):
    pass


class _CalmTidal(_Recorded, CalmTidal):
    pass


class _ReverseCalmTidal(_Recorded, ReverseCalmTidal):
    pass


CHUNK_LOSSES: dict[str, Any] = {
    "alm": _Calm,
    "reverse_alm": _ReverseCalm,
    "alm_taid": _CalmTidal,
    "reverse_alm_taid": _ReverseCalmTidal,
}


def block_diffusion(block_size: int) -> Context:
    """Return the context kind of [x_t ; x_0]."""
    return Context(kind="block_diffusion", block_size=block_size)


def swap_halves(mask: Tensor) -> Tensor:
    """Turn a mask over [x_t ; x_0] into the same rule over [x_0 ; x_t] (last two dimensions)."""
    half = mask.shape[-1] // 2
    return mask.roll((half, half), dims=(-2, -1))


def padded_mask(context: Context, real: Tensor) -> Tensor:
    """Render a context over sequences padded on the right, [samples, 1, queries, keys]; pads see nothing.

    Args:
        context: with one noised sequence, or with [x_t ; x_0].
        real: [samples, length] bool.
    """
    numbers = Segments.of_rows(real.sum(dim=1)).numbers(*real.shape)
    allowed = dense_mask(context, real.shape[1], numbers)
    return allowed & real.repeat(1, context.parts)[:, None, :, None]


def make_batch(ids: Tensor, labels: Tensor, side: TeacherTokens | None = None) -> Batch:
    """Make a microbatch of [samples, length] tokens, with the teacher's own tokens if it has some."""
    numbers = torch.zeros(len(ids), dtype=torch.int64)
    sides = {} if side is None else {TEACHER: side}
    return Batch(sample_ids=numbers, epochs=numbers, ids=ids, labels=labels, reply_bytes=numbers, sides=sides)


def make_side(ids: Tensor, spans: Tensor, sample: Tensor, number: Tensor) -> TeacherTokens:
    """Make a teacher's own tokens.

    Args:
        ids: [samples, length].
        spans: [chunks, 4]: student start and end, teacher start and end.
        sample: [chunks] sample of each.
        number: [chunks] what keys each chunk's split.
    """
    lengths = torch.full((len(ids),), ids.shape[1])
    return TeacherTokens(ids=ids, lengths=lengths, spans=spans.view(-1, 4), sample=sample, number=number)


def noise(
    batch: Batch, draws: tuple[Tensor, Tensor], schedule: str = "linear", *, by_chunk: bool = False
) -> Noised:
    """Mask tokens by recorded uniforms of the noise levels [samples] and the tokens [samples, length]."""
    chunks_of = (TEACHER,) if by_chunk else ()
    options = NoiseOptions(schedule=schedule)  # type: ignore[arg-type]
    return Noiser(seed=0, options=options, whole_chunks_of=chunks_of)(batch, draws)


def masked_at(masked: Tensor, time: Tensor) -> Noised:
    """Wrap a mask [samples, length] and noise levels [samples] where the tokens themselves do not matter."""
    ids = torch.zeros(masked.shape, dtype=torch.int64)
    return Noised(batch=make_batch(ids, ids.masked_fill(~masked, IGNORED)), time=time, masked=masked)


def student_view(noised: Noised, context: Context, mask_id: int) -> View:
    """Return what the student reads."""
    return plain_view(noised, context, mask_id)


def teacher_views(
    noised: Noised, context: Context, mask_id: int, draws: Tensor | None, forwards: int
) -> tuple[list[View], Tensor]:
    """Return what the teacher reads, pads included, and which of its rows are set A of the split [rows].

    Args:
        noised: the student's microbatch.
        context: the teacher's.
        mask_id: the teacher's.
        draws: [samples, keys] uniforms of the split, a chunk's keyed by its number; None: no split.
        forwards: 1: both views in one; 2: one after the other, set A is the second's.
    """
    reading = noised.reading(TEACHER)
    whole = torch.full_like(reading.lengths, reading.ids.shape[1], dtype=torch.int64)
    # Table models see pads: nothing is trimmed and nothing hidden.
    reading = dataclasses.replace(reading, lengths=whole, host_lengths=tuple(whole.tolist()))
    if draws is None:
        return [teacher_view(reading, context, mask_id)], torch.zeros_like(reading.targets)[reading.targets]
    shown = Complementary(seed=0).shown(noised.batch, reading, draws.gather(1, reading.unit))
    if forwards == 1:
        views = [complementary_view(reading, shown, context, mask_id)]
    else:
        views = [*complementary_passes(reading, shown, context, mask_id)]
    return views, shown[reading.targets]


def num_pairs(noised: Noised) -> int:
    """Count the masked position pairs of a teacher with its own tokens."""
    return noised.link(TEACHER).num_pairs


def evaluate(
    student: Tensor,
    teacher: Tensor | None,
    losses: Mapping[str, Loss],
    noised: Noised,
    clock: Clock,
    counts: Mapping[str, Tensor] | None = None,
) -> HeadResult:
    """Run the head loss on the rows of logits [rows, vocabulary] of both sides.

    `counts`, the divisors, are those of `noised` unless it is part of something larger.
    """
    counts = counts or {name: loss.count(noised) for name, loss in losses.items()}
    teachers = {} if teacher is None else {TEACHER: _headed(teacher)}
    rows = GatheredRows.alone(rows_of(noised), {name: float(count) for name, count in counts.items()})
    head = HeadLoss(losses, options=HeadOptions(form="plain"))
    return head(_headed(student), teachers, rows, clock)


def _headed(rows: Tensor) -> HeadInput:
    return HeadInput(hidden=rows, weight=torch.eye(rows.shape[-1]))


def logit_terms(case: Mapping[str, Any]) -> dict[str, Loss]:
    """Build the terms of a mode like `taid_aligned+kl_aligned`, named as the file's log keys name them."""
    common = {"temperature": case["kl_temperature"], "shared_vocab_size": case["shared_vocab_size"]}
    kl = {"weight": case["kl_weight"]}
    tidal = {"weight": case["taid_weight"], "timestep_weight": case["taid_timestep_weight"]}
    terms: dict[str, Loss] = {"ce": CrossEntropy()}
    for name in (term.removesuffix("_aligned") for term in case["mode"].split("+")):
        terms[name] = LOGIT_LOSSES[name](teacher=TEACHER, **common, **(tidal if name == "taid" else kl))
    return terms


def chunk_terms(case: Mapping[str, Any]) -> dict[str, Loss]:
    """Build the two terms of a mode like `reverse_alm_taid`, named as the file's log keys name them."""
    mode = case["mode"]
    mixed = {"axes": case["taid_axis_mode"], "timestep_weight": case["taid_timestep_weight"]}
    options = {"temperature": case["alm_temperature"], **(mixed if mode.endswith("_taid") else {})}
    return {
        "ce": plain_term(case["loss_weight_type"], case["loss_norm_type"]),
        mode: CHUNK_LOSSES[mode](teacher=TEACHER, **options),
    }


def plain_term(timestep_weight: str, divisor: str, schedule: str = "linear") -> CrossEntropy:
    """Build cross-entropy."""
    return CrossEntropy(timestep_weight=timestep_weight, normalization=divisor, schedule=schedule)  # type: ignore[arg-type]


def tidal_term(case: Mapping[str, Any]) -> Tidal:
    """Build TIDAL from a case of taid.npz."""
    return Tidal(teacher=TEACHER, **{ours: case[key] for key, ours in TIDAL_OPTIONS.items() if key in case})


def trained_share(loss: Loss, clock: Clock) -> Tensor | None:
    """Return lambda_train, whatever the axes of a mixture are; None: the loss is no mixture."""
    if not isinstance(loss, Mixture):
        return None
    return dataclasses.replace(loss, axes="training_only").teacher_share(torch.zeros(()), clock)


def chunk_likelihoods(logits: Tensor, ids: Tensor, align: Tensor, temperature: float) -> Bernoulli:
    """Return the likelihood of each chunk [samples * chunks] under an alignment matrix.

    Args:
        logits: [samples, length, vocabulary].
        ids: [samples, length].
        align: [samples, length, chunks] bool.
        temperature: of the likelihoods.
    """
    samples, length, chunks = align.shape
    tokens = gold_log_likelihood(logits, ids).flatten()
    sample, position, chunk = align.nonzero(as_tuple=True)
    number = samples * chunks
    member, (place, order) = sample * length + position, (sample * chunks + chunk).sort(stable=True)
    logs = chunk_log_likelihoods(tokens, member[order], place, number)
    return recorded_likelihood(logs, temperature)


def chunk_values(name: str, temperature: float, student: Bernoulli, teacher: Bernoulli) -> Tensor:
    """Return the value of `alm` or `reverse_alm` for each chunk."""
    values: Tensor = CHUNK_LOSSES[name](teacher=TEACHER, temperature=temperature).compare(student, teacher)
    return values
