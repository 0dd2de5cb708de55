"""What a model reads: a `View` of a noised batch, for the student and for every teacher alike.

Three context kinds (design section 4): `bidirectional` (one noised sequence, everybody sees everybody),
`block_causal` (one noised sequence, a block sees itself and the blocks before it), `block_diffusion`
([x_t ; x_0]: noised half then clean half, spec section 1).

Complementary views (CompDemo, spec section 3) show a teacher half of the masked tokens at a time: the first
view shows set A and answers for the rest, the second the other way round. They are one forward: under block
diffusion [x_tA ; x_tB ; x_0], whose clean part is read once; else a batch of twice the size. Two forwards of
one view each are kept as the oracle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.alignment import TeacherInput
from tide_megatron.diffusion.batch import Batch, Noised
from tide_megatron.diffusion.mask import Context, TwoViews
from tide_megatron.diffusion.noise import uniforms
from tide_megatron.diffusion.segments import Segments

SPLIT_STREAM = "complementary"
"""Stream of the split: one draw per position, or per chunk of a teacher with its own tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """One model's input for one microbatch."""

    ids: Tensor
    """[samples, parts * length] int64; a row of a packed view holds several samples."""
    positions: Tensor
    """[samples, parts * length] int64: 0..length-1 in each part, or from 0 on in each segment of it."""
    context: Context
    length: int
    """Length of one part."""
    segments: Segments | None
    """Which positions belong together, by which attention hides pads and a pack's other samples; None: rows
    hold one sample each, and no real token would see a pad, so pads are ordinary."""
    rows: Tensor
    """[rows] int64: flat indices into [samples * parts * length] of the positions to predict."""

    def shifted(self) -> View:
        """Return the view of a model whose state at a position predicts the token behind it.

        It is asked for the states one position earlier; the first token of a segment in each part, which
        nothing stands before, keeps its own. What is predicted stays the same, so nobody but the model needs
        to know.
        """
        is_first = self._own(self.positions) == 0
        return dataclasses.replace(self, rows=torch.where(is_first, self.rows, self.rows - 1))

    def padded(self, samples: int, length: int) -> View:
        """Return the view with more samples and longer parts, for models that want equal shapes.

        What the real tokens see does not change: pads that they would see, a bidirectional context's or those
        in a last, unfinished block, are hidden by `segments`.

        Args:
            samples: at least as many as there are; further ones are one token long.
            length: of one part, at least what it is.
        """
        more = samples - len(self.ids), length - self.length
        if more == (0, 0):
            return self
        parts = self.context.parts
        ids = self.ids.view(len(self.ids), parts, self.length)
        ids = torch.nn.functional.pad(ids, (0, more[1], 0, 0, 0, more[0])).flatten(1)
        segments = self.segments
        if segments is None and _sees_pads(self.context, [self.length], length):
            segments = Segments.of_rows(self.rows.new_full((len(self.ids),), self.length))
        if segments is not None:
            segments = segments.with_rows(len(self.ids), more[0])
        rows = self.rows // self.length * length + self.rows % self.length
        return view_of_parts(ids, self.context, segments, rows)

    def rounded(self, multiple: int) -> View:
        """Return the view `padded` to a whole multiple of so many tokens a sample; rows stay the same."""
        step = multiple // math.gcd(multiple, self.context.parts)
        return self.padded(len(self.ids), -(-self.length // step) * step)

    def numbers(self) -> Tensor | None:
        """Render the segments for a mask, [samples, length] int64; None: there are none to tell apart."""
        return None if self.segments is None else self.segments.numbers(len(self.ids), self.length)

    def order(self) -> Tensor:
        """Return [rows] int64 keys of the rows, by which they sort as their samples and positions do."""
        numbers = self.numbers()
        if numbers is None:
            return self.rows
        return self._own(numbers.repeat(1, self.context.parts)) * self.length + self._own(self.positions)

    def _own(self, values: Tensor) -> Tensor:
        """Pick what stands at the rows, [samples, parts * length] -> [rows]."""
        tokens = self.ids.shape[1]
        return values[self.rows // tokens, self.rows % tokens]


def view_of_parts(ids: Tensor, context: Context, segments: Segments | None, rows: Tensor) -> View:
    """Build a view from its parts behind each other; positions restart in each, and in each segment.

    Where rows hold one sample each, positions are stored once for all of them.

    Args:
        ids: [samples, parts * length] int64.
        context: the model's context kind, with as many parts.
        segments: of each part, or None.
        rows: [rows] int64 flat indices.
    """
    samples, tokens = ids.shape
    length = tokens // context.parts
    if segments is None or len(segments.pack) == samples:
        positions = torch.arange(length, device=ids.device).repeat(context.parts).expand(samples, -1)
    else:
        positions = segments.positions(samples, length).repeat(1, context.parts)
    return View(ids=ids, positions=positions, context=context, length=length, segments=segments, rows=rows)


def plain_view(noised: Noised, context: Context, mask_id: int, segments: Segments | None = None) -> View:
    """Build the view in which every masked token is shown as `mask_id`.

    Args:
        noised: the microbatch, [samples, length].
        context: the model's context kind and block size.
        mask_id: the mask token of THIS model (teacher and student may differ).
        segments: one a row, where padding must not be attended to (teachers of the reference).
    """
    ids, masked = noised.batch.ids, noised.masked
    sample, position = noised.row_index
    copies = [ids.masked_fill(masked, mask_id), *[ids] * (context.parts - context.noised_parts)]
    return _view(copies, context, segments, sample * context.parts * ids.shape[1] + position)


def trimmed_view(noised: Noised, context: Context, mask_id: int) -> View:
    """Build the plain view that does not depend on how far the batch was padded.

    Pads that a real token would see, and by which it would depend on its batchmates, are hidden. Where none
    is seen they stay ordinary tokens, as in the reference.
    """
    batch = noised.batch
    segments = _segments(context, batch.lengths, batch.host_lengths, batch.ids.shape[1])
    return plain_view(noised, context, mask_id, segments)


def teacher_view(reading: TeacherInput, context: Context, mask_id: int) -> View:
    """Build a teacher's plain view of its own tokens, without the padding that nobody needs.

    Args:
        reading: what this teacher reads; its rows are those it is asked about.
        context: its context kind and block size.
        mask_id: its mask token.
    """
    reading = _trim(reading, context)
    return _pass(reading, reading.masked, reading.index, context, mask_id)


def complementary_view(reading: TeacherInput, shown: Tensor, context: Context, mask_id: int) -> View:
    """Build both complementary views as one forward; rows are in (sample, position) order as ever.

    Args:
        reading: what this teacher reads.
        shown: [samples, length] bool: set A, the masked tokens that the first view shows.
        context: the teacher's context kind and block size.
        mask_id: the teacher's mask token.
    """
    reading = _trim(reading, context)
    shown = shown[:, : reading.ids.shape[1]]
    first = reading.ids.masked_fill(reading.masked & ~shown, mask_id)
    second = reading.ids.masked_fill(reading.masked & shown, mask_id)
    samples, length = reading.ids.shape
    segments = _segments(context, reading.lengths, reading.host_lengths, length)
    sample, position = reading.index
    is_second = shown[sample, position].long()
    if context.kind == "block_diffusion":
        both = TwoViews(kind=context.kind, block_size=context.block_size)
        rows = (sample * both.parts + is_second) * length + position
        return _view([first, second, reading.ids], both, segments, rows)
    rows = (is_second * samples + sample) * length + position
    doubled = None if segments is None else Segments.of_rows(segments.tokens.repeat(2))
    return _view([torch.cat([first, second])], context, doubled, rows)


def complementary_passes(
    reading: TeacherInput, shown: Tensor, context: Context, mask_id: int
) -> tuple[View, View]:
    """Build the two complementary views apart: the first answers outside `shown`, the second inside it.

    Args:
        reading: what this teacher reads.
        shown: [samples, length] bool: set A, the masked tokens that the first view shows.
        context: the teacher's context kind and block size.
        mask_id: the teacher's mask token.
    """
    reading = _trim(reading, context)
    shown = shown[:, : reading.ids.shape[1]]
    first, second = ((reading.targets & part).nonzero(as_tuple=True) for part in (~shown, shown))
    return (
        _pass(reading, reading.masked & ~shown, first, context, mask_id),
        _pass(reading, reading.masked & shown, second, context, mask_id),
    )


def _pass(
    reading: TeacherInput, masked: Tensor, targets: tuple[Tensor, ...], context: Context, mask_id: int
) -> View:
    """Build one view of a trimmed reading: what it masks [samples, length] bool, and what it answers.

    Args:
        reading: trimmed.
        masked: shown as the mask token.
        targets: ([rows], [rows]) sample and position.
        context: the teacher's.
        mask_id: the teacher's.
    """
    noisy = reading.ids.masked_fill(masked, mask_id)
    copies = [noisy, *[reading.ids] * (context.parts - context.noised_parts)]
    sample, position = targets
    length = reading.ids.shape[1]
    segments = _segments(context, reading.lengths, reading.host_lengths, length)
    return _view(copies, context, segments, sample * context.parts * length + position)


def _view(copies: list[Tensor], context: Context, segments: Segments | None, rows: Tensor) -> View:
    """Join the copies of the sequence."""
    return view_of_parts(torch.cat(copies, dim=1), context, segments, rows)


def _segments(context: Context, real: Tensor, host: Sequence[int], length: int) -> Segments | None:
    """Return the segments by which a view hides its pads; None where no real token would see one.

    Decided on the host, for the whole microbatch: attention without them is cheaper.

    Args:
        context: the model's.
        real: [samples] int64 real tokens of each part.
        host: the same as plain numbers.
        length: tokens of each part, pads included.
    """
    return Segments.of_rows(real) if _sees_pads(context, host, length) else None


def _sees_pads(context: Context, real: Sequence[int], length: int) -> bool:
    """Say whether a real token may see a pad in samples of these real tokens, padded to `length`.

    Under block contexts it is seen inside the last real token's block only: where a model's block is not the
    one that samples were filled up to.
    """
    if context.kind == "bidirectional":
        return True
    block = context.block_size
    return any(tokens < min(-(-tokens // block) * block, length) for tokens in real)


def _needed(reading: TeacherInput, context: Context) -> int:
    """Return how many positions the longest sample has, in whole blocks where there are blocks."""
    block = 1 if context.kind == "bidirectional" else context.block_size
    return min(-(-max(reading.host_lengths) // block) * block, reading.ids.shape[1])


def _trim(reading: TeacherInput, context: Context) -> TeacherInput:
    """Cut the padding behind the longest sample; it may be long where the loader pads to a fixed length.

    What is asked lies before the cut, so `index` stays.
    """
    length = _needed(reading, context)
    cut = {name: getattr(reading, name)[:, :length] for name in ("ids", "masked", "targets", "unit")}
    return dataclasses.replace(reading, **cut)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complementary:
    """CompDemo's split: which half of the masked tokens a teacher is shown first (spec section 3).

    Each masked token joins set A with probability `share`, independently; with a second tokenizer each chunk
    does, so that both models speak about whole chunks. At share 0 the first view masks everything and the
    second is asked nothing: the plain view. The draw is a pure function like all noise (design section 5).
    """

    seed: int
    share: float = 0.5
    """Probability of being shown in the first view."""

    def __post_init__(self) -> None:
        """Refuse a share outside [0, 1]."""
        if not 0.0 <= self.share <= 1.0:
            raise ConfigError(f"shown_share: {self.share} is not in [0, 1]; the paper uses 0.5")

    def shown(self, batch: Batch, reading: TeacherInput, draws: Tensor | None = None) -> Tensor:
        """Return set A: the masked tokens that the first view shows, [samples, length] bool.

        Args:
            batch: sample ids and epochs that key the draws.
            reading: the teacher's copy of the microbatch.
            draws: [samples, length] fp32 uniforms to use instead of the hash (goldens).
        """
        if draws is None:
            epoch, sample_id = batch.epochs[:, None], batch.sample_ids[:, None]
            draws = uniforms(self.seed, epoch, sample_id, SPLIT_STREAM, reading.unit)
        return (draws < self.share) & reading.masked
