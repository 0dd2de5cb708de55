"""One microbatch at the sizes of a bench, in the form that each way to a head loss wants.

Hidden states and heads are random numbers; text, noise levels and chunks follow the paper's sizes: two
samples of 512 tokens of which 424 may be masked, one uniform noise level a sample. For Reverse CALM whole
chunks are masked, runs of 1 to 3 student tokens that are 1 to 4 of the teacher's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.plain_head import TILE, ChunkLikelihoods, Microbatch, Model, MovingTarget, Term
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.alignment import RowAlignment
from tide_megatron.losses.base import Loss
from tide_megatron.losses.calm import ReverseCalm
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.rows import Rows
from tide_megatron.losses.tidal import Tidal

TEACHER = "teacher"
CLOCK = Clock(step=37, total_steps=100)
MASKABLE_SHARE = 424 / 512
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes; the defaults are those of the head of Qwen3-0.6B."""

    loss: Literal["tidal", "reverse_calm"]
    """What is added to cross-entropy."""
    precision: Literal["bf16", "fp32"] = "bf16"
    samples: int = 2
    copies: int = 1
    """How often the samples' text and noise are repeated; their hidden states are not."""
    length: int = 512
    hidden: int = 1024
    teacher_hidden: int = 1024
    vocabulary: int = 151_936
    shared: int = 151_646
    """First ids that TIDAL compares."""
    seed: int = 0
    teacher_halves: int = 0
    """How many halves the teacher's head reads in the plain way. 0: what the reference does, both halves of
    [x_t ; x_0] under TIDAL, whose teacher is a block-diffusion model, and one sequence under Reverse CALM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What is read and what is masked of it; `chunks` only where there are any."""

    ids: Tensor
    """[samples, length] int64."""
    masked: Tensor
    """[samples, length] bool."""
    teacher_ids: Tensor
    """[samples, teacher length] int64."""
    asked: Tensor
    """[samples, teacher length] bool: the teacher's rows."""
    time: Tensor
    """[samples] fp32."""
    maskable: Tensor
    """[samples] int64."""
    chunks: tuple[tuple[int, ...], ...] = ()
    """(sample, student start and end, teacher start and end) of each chunk that enters the loss."""

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return chunks as columns of both sides' matrices, and which columns are in use."""
        most = max(sum(chunk[0] == sample for chunk in self.chunks) for sample in range(len(self.ids)))
        both = [torch.zeros(*ids.shape, most, dtype=torch.bool) for ids in (self.ids, self.teacher_ids)]
        active = torch.zeros(len(self.ids), most, dtype=torch.bool)
        for sample, start, end, teacher_start, teacher_end in self.chunks:
            column = int(active[sample].sum())
            both[0][sample, start:end, column] = True
            both[1][sample, teacher_start:teacher_end, column] = True
            active[sample, column] = True
        return both[0], both[1], active

    def link(self) -> RowAlignment:
        """Return chunks as rows of both sides; no pairs."""
        members = []
        for hidden, first in ((self.masked, 1), (self.asked, 3)):
            number = (hidden.flatten().long().cumsum(0) - 1).view(hidden.shape)
            spans = [number[chunk[0], chunk[first] : chunk[first + 1]] for chunk in self.chunks]
            chunk = torch.arange(len(spans)).repeat_interleave(torch.tensor([len(span) for span in spans]))
            members.append((torch.cat(spans), chunk))
        nothing = torch.empty(0, dtype=torch.int64)
        return RowAlignment(
            gold=self.teacher_ids[self.asked],
            chunk_sample=torch.tensor([chunk[0] for chunk in self.chunks]),
            student_rows=members[0],
            teacher_rows=members[1],
            pairs=(nothing, nothing),
            pair_sample=nothing,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A drawn microbatch."""

    text: Text
    student: Model
    """All 2l positions of [x_t ; x_0]."""
    teacher: Model
    losses: dict[str, Loss]
    counts: dict[str, float]
    gradient: Tensor
    """[vocabulary, hidden size] fp32: what data-parallel training keeps all the time."""

    @property
    def rows(self) -> Rows:
        """What losses may know of the hidden rows."""
        text = self.text
        return Rows(
            gold=text.ids[text.masked],
            sample=text.masked.nonzero()[:, 0],
            time=text.time,
            maskable=text.maskable,
            links={TEACHER: text.link()} if text.chunks else {},
        )

    @property
    def hidden_rows(self) -> tuple[Tensor, Tensor]:
        """([rows, hidden size], [teacher rows, teacher's hidden size]): copies."""
        length = self.text.ids.shape[1]
        asked = self.text.asked
        answered = self.teacher.hidden[:, : asked.shape[1]][asked]
        return self.student.hidden[:, :length][self.text.masked], answered

    @property
    def microbatch(self) -> Microbatch:
        """What the plain way knows."""
        weight = (1 / (self.text.time + 1e-6) / self.text.maskable.sum())[:, None]  # the linear schedule's
        return Microbatch(
            ids=self.text.ids,
            masked=self.text.masked,
            token_weight=weight.expand(self.text.ids.shape),
        )

    @property
    def term(self) -> Term:
        """The distillation loss in the plain way's words."""
        loss = next(loss for loss in self.losses.values() if loss.teacher)
        if isinstance(loss, Tidal):
            return MovingTarget(
                temperature=loss.temperature,
                columns=loss.shared_vocab_size,
                share=loss.teacher_share(self.text.time, CLOCK),
                timestep_weight=torch.ones_like(self.text.time),
                weight=loss.weight,
            )
        assert isinstance(loss, ReverseCalm), f"the plain way has no {loss}"
        mine, theirs, active = self.text.matrices()
        return ChunkLikelihoods(
            temperature=loss.temperature,
            teacher_ids=self.text.teacher_ids,
            members=(mine, theirs),
            active=active,
            weight=loss.weight,
        )

    def floor(self) -> Callable[[], None]:
        """Return what no form can leave out: four products on hidden rows in one piece, one fp32 addition.

        Its buffers are kept between calls, like those of our form.
        """
        hidden, answer = self.hidden_rows
        weight, teacher_weight = self.student.weight, self.teacher.weight
        logits, answered = (
            rows.new_empty(len(rows), len(head))
            for rows, head in ((hidden, weight), (answer, teacher_weight))
        )
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

        def work() -> None:
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(answer, teacher_weight.t(), out=answered)
            torch.mm(logits, weight, out=hidden_gradient)
            torch.mm(logits.t(), hidden, out=weight_gradient)
            for first in range(0, len(weight), TILE):
                self.gradient[first : first + TILE] += weight_gradient[first : first + TILE]

        return work


def draw_case(setting: Setting) -> Case:
    """Draw a microbatch, the same for equal settings."""
    generator = torch.Generator().manual_seed(setting.seed)
    draw = _shared_text if setting.loss == "tidal" else _chunked_text
    text = _repeated(draw(setting, generator), setting.copies)
    samples, length = text.ids.shape
    halves = setting.teacher_halves or (2 if setting.loss == "tidal" else 1)
    assert halves == 1 or not text.chunks, "matrices of chunks have the teacher's own length"
    dtype = DTYPES[setting.precision]

    def numbers(scale: float, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(0, scale, generator=generator)

    loss: Loss = Tidal(teacher=TEACHER, shared_vocab_size=setting.shared)
    items = int(text.masked.sum())
    if setting.loss == "reverse_calm":
        loss, items = ReverseCalm(teacher=TEACHER, temperature=5.0), len(text.chunks)
    return Case(
        text=text,
        student=Model(
            hidden=numbers(0.5, samples, 2 * length, setting.hidden),
            weight=numbers(0.05, setting.vocabulary, setting.hidden),
        ),
        teacher=Model(
            hidden=numbers(0.5, samples, halves * text.asked.shape[1], setting.teacher_hidden),
            weight=numbers(0.05, setting.vocabulary, setting.teacher_hidden),
        ),
        losses={"cross_entropy": CrossEntropy(), setting.loss: loss},
        counts={"cross_entropy": float(text.maskable.sum()), setting.loss: float(items)},
        gradient=torch.full((setting.vocabulary, setting.hidden), 0.0),  # zeros() would not touch its pages
    )


def _shared_text(setting: Setting, generator: torch.Generator) -> Text:
    """Let both models read the same tokens, and hide each on its own."""
    shape = (setting.samples, setting.length)
    time = torch.rand(setting.samples, generator=generator)
    first = _first_maskable(setting)
    ids = torch.randint(setting.shared, shape, generator=generator)
    masked = torch.rand(shape, generator=generator) < time[:, None]
    masked[:, :first] = False
    return Text(
        ids=ids,
        masked=masked,
        teacher_ids=ids,
        asked=masked,
        time=time,
        maskable=torch.full((setting.samples,), setting.length - first),
    )


def _chunked_text(setting: Setting, generator: torch.Generator) -> Text:
    """Cut the reply into chunks in both models' tokens, and hide chunks whole."""
    time = torch.rand(setting.samples, generator=generator)
    first = _first_maskable(setting)
    chunks, ends = [], []
    for sample in range(setting.samples):
        start = teacher_start = first
        while start < setting.length:
            size, more = (int(torch.randint(3, (), generator=generator)) for _ in range(2))
            end = min(start + size + 1, setting.length)
            teacher_end = teacher_start + max(1, end - start + more - 1)  # 1 to 4
            if torch.rand((), generator=generator) < time[sample]:
                chunks.append((sample, start, end, teacher_start, teacher_end))
            start, teacher_start = end, teacher_end
        ends.append(torch.zeros(teacher_start, dtype=torch.bool))
    masked = torch.zeros(setting.samples, setting.length, dtype=torch.bool)
    asked = pad_sequence(ends, batch_first=True)
    for sample, start, end, teacher_start, teacher_end in chunks:
        masked[sample, start:end] = True
        asked[sample, teacher_start:teacher_end] = True
    return Text(
        ids=torch.randint(setting.vocabulary, masked.shape, generator=generator),
        masked=masked,
        teacher_ids=torch.randint(setting.vocabulary, asked.shape, generator=generator),
        asked=asked,
        time=time,
        maskable=torch.full((setting.samples,), setting.length - first),
        chunks=tuple(chunks),
    )


def _first_maskable(setting: Setting) -> int:
    """Return where the reply begins."""
    return setting.length - round(MASKABLE_SHARE * setting.length)


def _repeated(text: Text, copies: int) -> Text:
    """Put a text several times below itself."""
    samples = len(text.ids)
    tensors = {
        field.name: torch.cat([getattr(text, field.name)] * copies)
        for field in dataclasses.fields(text)
        if field.name != "chunks"
    }
    chunks = tuple((first[0] + copy * samples, *first[1:]) for copy in range(copies) for first in text.chunks)
    return Text(**tensors, chunks=chunks)
