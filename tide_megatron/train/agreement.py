"""How far the student is from each teacher on held-out data, by noise level, and where chunk losses push.

The samples are the first of those that evaluation scores, with the same tokens masked: two runs, and two
moments of a run, are asked about the same rows. Student and teachers read them as in a training step, on the
ranks where they stand; heads stay cut by vocabulary.

Of a teacher whose ids are the student's: KL(teacher || student) at temperature 1, and how often both find the
same id the most likely. Of every teacher, its chunks: a chunk whose likelihood under the teacher is above one
half, at the loss's temperature, is *pushed up* by Reverse CALM, whose gradient goes with log(p / (1 - p)) of
the teacher. KL of a chunk is that of a coin, the chunk or anything else: never above that of all that could
stand there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.base.files import write_text
from tide_megatron.base.heartbeat import HEARTBEAT
from tide_megatron.base.memory import peak_memory_bytes
from tide_megatron.base.read import text_of
from tide_megatron.base.segments import segment_sums
from tide_megatron.base.units import now
from tide_megatron.data.loader import Loader
from tide_megatron.diffusion.alignment import RowAlignment
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.evaluate.likelihood import EVALUATION_SEED, drawn_samples
from tide_megatron.evaluate.options import Evaluation
from tide_megatron.head.agreement import compare_rows
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.tiles import score_rows
from tide_megatron.losses.calm import ChunkLikelihood, chunk_log_likelihoods, likelihood
from tide_megatron.parallel.collectives import own_share, sum_over
from tide_megatron.parallel.exchange import COMM_STATS
from tide_megatron.text.align import differing_ids
from tide_megatron.train.counts import count
from tide_megatron.train.folder import AGREEMENT
from tide_megatron.train.setup import Setup
from tide_megatron.train.step_input import StepInput

log = logging.getLogger(__name__)

BINS = 20
"""Of equal width, over a chunk's likelihood."""
COUNTED = ("pairs", "kl", "same", "chunks", "chunk_kl", "pushed_up")
"""What is added up of a source at a noise level, before the two histograms."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherAgreement:
    """What was added up of one teacher."""

    ids: int
    """How many first ids were compared; 0: the vocabularies have none in common, so there are no pairs."""
    temperature: float
    """By which chunks' log-likelihoods were divided: of the first term that compares them, else 1."""
    sums: Tensor
    """[sources, levels, COUNTED + 2 x BINS] fp64: the histograms are the teacher's and the student's."""

    def row(self, sums: Tensor) -> dict[str, Any]:
        """Return the means of some sums, [COUNTED + 2 x BINS], as plain values."""
        counted = dict(zip(COUNTED, sums[: len(COUNTED)].tolist(), strict=True))
        pairs, chunks = counted["pairs"], counted["chunks"]
        found: dict[str, Any] = {"pairs": int(pairs), "chunks": int(chunks)}
        if pairs:
            found |= {"kl": counted["kl"] / pairs, "top1": counted["same"] / pairs}
        if chunks:
            found |= {name: counted[name] / chunks for name in ("chunk_kl", "pushed_up")}
        teacher, student = sums[len(COUNTED) :].view(2, BINS).long().tolist()
        return found | {"teacher_likelihoods": teacher, "student_likelihoods": student}

    def values(self, times: Sequence[float], sources: Sequence[str]) -> dict[str, Any]:
        """Return plain values: over all, by noise level and by source."""
        by_level, by_source = self.sums.sum(dim=0), self.sums.sum(dim=1)
        return {
            "ids": self.ids,
            "temperature": self.temperature,
            **self.row(by_level.sum(dim=0)),
            "by_time": [{"time": time} | self.row(by_level[place]) for place, time in enumerate(times)],
            "by_source": [
                {"source": name} | self.row(by_source[place]) for place, name in enumerate(sources)
            ],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """One measurement of all teachers that held-out data was prepared for."""

    samples: int
    times: tuple[float, ...]
    sources: tuple[str, ...]
    teachers: Mapping[str, TeacherAgreement]

    def values(self) -> dict[str, Any]:
        """Return plain values, for a file."""
        return {
            "samples": self.samples,
            "times": list(self.times),
            "teachers": {name: one.values(self.times, self.sources) for name, one in self.teachers.items()},
        }

    def metrics(self) -> dict[str, float]:
        """Return the figures over all levels and sources, by the names of docs/metrics.md."""
        found: dict[str, float] = {}
        names = {"kl": "teacher_kl", "top1": "teacher_top1", "chunk_kl": "chunk_kl", "pushed_up": "pushed_up"}
        for teacher, one in self.teachers.items():
            row = one.row(one.sums.sum(dim=(0, 1)))
            found |= {f"{name}/{teacher}": row[key] for key, name in names.items() if key in row}
        return found


@torch.no_grad()
def measure_agreement(setup: Setup, options: Evaluation) -> Agreement | None:
    """Compare the student with the teachers on held-out data. All ranks call it together.

    Every rank of every replica forwards equally often; one that runs out of samples reads the first again
    and leaves it out of the sums.

    Returns:
        The same on every rank; None: there is no held-out data, or no teacher can read it.
    """
    loader, run = setup.held_out, setup.run
    names = [] if loader is None else _readers(setup, loader)
    if loader is None or not names:
        return None
    drawn, of_sample = drawn_samples(loader, options.agreement)
    sources = tuple(sorted(set(of_sample)))
    numbers = torch.tensor([sources.index(name) for name in of_sample])
    work = {name: _Comparison(setup, name, len(sources), len(options.times)) for name in names}
    shard, microbatch = run.student.shard, options.microbatch
    is_training = run.student.model.training
    run.student.model.eval()
    with COMM_STATS.apart():
        for step in range(math.ceil(len(drawn) / (microbatch * shard.size))):
            HEARTBEAT.beat("evaluate")
            first = (step * shard.size + shard.rank) * microbatch
            mine = list(range(first, min(first + microbatch, len(drawn))))
            batch = loader.batch_of([drawn[place] for place in mine or [0]])
            for level, time in enumerate(options.times):
                noiser = Noiser(seed=EVALUATION_SEED, stream_suffix=f"@{time}")
                teachers = {name: run.teachers[name] for name in names}
                given = StepInput.of(
                    [batch], functools.partial(noiser.at, time=time), run.student, teachers, run.head.losses
                )
                student, answers, rows = _read(setup, given)
                for name, teacher in answers.items():
                    work[name].add(student, teacher, rows, level, numbers[mine])
    run.student.model.train(is_training)
    repeats = own_share()[1] // shard.size  # the ranks of a replica add the same
    found = {name: one.total(repeats) for name, one in work.items()}
    return Agreement(samples=len(drawn), times=tuple(options.times), sources=sources, teachers=found)


def _readers(setup: Setup, loader: Loader) -> list[str]:
    """Return the teachers that can read held-out data, in the run's order."""
    found = []
    for name in setup.run.teachers:
        if name in setup.loader.sides and name not in loader.sides:
            log.warning(
                "teachers.%s: data.held_out has none of its tokens, so agreement is not measured; prepare it "
                "again with --teacher %s=...",
                *(name, name),
            )
        else:
            found.append(name)
    return found


def _read(setup: Setup, given: StepInput) -> tuple[HeadInput, Mapping[str, HeadInput], GatheredRows]:
    """Let student and teachers read one microbatch. All ranks call it together.

    Returns:
        All the vocabulary group's rows of the student, and of each teacher, with this rank's columns; and
        what is known of the rows.
    """
    run = setup.run
    counts = count(given, run.head, run.student.shard, peak_memory_bytes())
    given = given.on(run.device)
    (rows,) = run.head.gather(given.rows, counts.rows, counts.divisors)
    answers = {
        name: next(run.teachers[name].hidden_states(request, counts.view_sizes[name]))
        for name, request in given.requests.items()
    }
    student, teachers = run.head.shared(run.student.rows(given.views[0]), answers, rows)
    return student, teachers, rows


class _Comparison:
    """What is added up of one teacher on this rank."""

    def __init__(self, setup: Setup, name: str, sources: int, levels: int) -> None:
        self.name, self.group = name, setup.run.head.group.group
        losses = [loss for loss in setup.run.head.losses.values() if loss.teacher == name]
        chunked = [loss.temperature for loss in losses if isinstance(loss, ChunkLikelihood)]
        self.temperature = chunked[0] if chunked else 1.0
        self.ids = _common_ids(setup, name)
        width = len(COUNTED) + 2 * BINS
        self.sums = torch.zeros(sources, levels, width, dtype=torch.float64, device=setup.run.device)

    def add(
        self, student: HeadInput, teacher: HeadInput, rows: GatheredRows, level: int, sources: Tensor
    ) -> None:
        """Take in one microbatch at a noise level. All ranks of the vocabulary group call it together.

        Args:
            student: all the group's rows.
            teacher: likewise.
            rows: what is known of them.
            level: number of the noise level.
            sources: [own samples] int64: number of each one's source; empty: nothing here is counted.
        """
        link = rows.rows.link(self.name)
        if self.ids:
            kl, same = self._pairs(student, teacher, link)
            values = torch.stack([torch.ones_like(kl), kl, same], dim=1)
            self._count(values, link.pair_sample, rows, level, sources, first=0)
        ours, theirs = (
            chunk_log_likelihoods(-score_rows(head, gold, self.group).nll, *members, link.num_chunks)
            for head, gold, members in (
                (student, rows.rows.gold, link.student_rows),
                (teacher, link.gold, link.teacher_rows),
            )
        )
        self._count(self._chunks(ours, theirs), link.chunk_sample, rows, level, sources, first=3)

    def _pairs(self, student: HeadInput, teacher: HeadInput, link: RowAlignment) -> tuple[Tensor, Tensor]:
        """Return KL and whether the first ids are the same of each pair, [pairs] each."""
        if link.pairs is not None:
            mine, theirs = link.pairs
            student = dataclasses.replace(student, hidden=student.hidden[mine])
            teacher = dataclasses.replace(teacher, hidden=teacher.hidden[theirs])
        found = compare_rows(student, teacher, self.ids, self.group)
        return found.kl, found.is_same.float()

    def _chunks(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Return what is counted of chunks with these log-likelihoods, [chunks, 3 + 2 x BINS]."""
        mine, target = likelihood(ours, 1.0), likelihood(theirs, 1.0)
        kl = target.p * (target.log_p - mine.log_p) + target.rest * (target.log_rest - mine.log_rest)
        soft_mine, soft_target = (likelihood(one, self.temperature) for one in (ours, theirs))
        is_pushed_up = soft_target.log_p > soft_target.log_rest
        bins = [
            torch.nn.functional.one_hot((one.p * BINS).long().clamp(0, BINS - 1), BINS)
            for one in (soft_target, soft_mine)
        ]
        counted = torch.stack([torch.ones_like(kl), kl, is_pushed_up.float()], dim=1)
        return torch.cat([counted, *bins], dim=1)

    def _count(
        self,
        values: Tensor,
        sample: Tensor,
        rows: GatheredRows,
        level: int,
        sources: Tensor,
        *,
        first: int,
    ) -> None:
        """Add [items, numbers] of this rank's own samples to their sources' sums, from a column on."""
        if not len(sources):
            return
        kept = rows.is_own(sample)
        source = sources.to(values.device)[sample[kept] - int(rows.own.start)]
        source, order = source.sort(stable=True)
        added = segment_sums(values[kept][order].double(), source, len(self.sums))
        self.sums[:, level, first : first + values.shape[1]] += added

    def total(self, repeats: int) -> TeacherAgreement:
        """Add up all ranks. All ranks call it together."""
        sums = sum_over(self.sums).cpu() / repeats
        return TeacherAgreement(ids=self.ids, temperature=self.temperature, sums=sums)


def _common_ids(setup: Setup, name: str) -> int:
    """Return how many first ids student and teacher have in common; 0: they were made apart.

    A tokenizer that is another from some id on shares those before it, as `shared_vocab_size` has it; one
    that parts within its first half is taken for one of its own.
    """
    ours, theirs = setup.tokenizer, setup.tokenizers[name]
    heads = setup.run.student.model.architecture, setup.run.teachers[name].model.architecture
    limit = min(*(head.vocabulary for head in heads), max(ours.vocabulary_size, theirs.vocabulary_size))
    different = differing_ids(ours, theirs, limit)
    common = different[0] if different else limit
    return common if 2 * common > limit else 0


def keep_agreement(folder: Path, clock: Clock, values: Mapping[str, Any]) -> None:
    """Add a measurement to the run folder's agreement.jsonl (only the first rank calls it).

    Lines of the same or a later moment, of a start whose steps were not saved, go; so do torn ones.
    """
    file, kept = folder / AGREEMENT, []
    lines = text_of(file).splitlines() if file.is_file() else []
    for line in lines:
        try:
            is_before = json.loads(line)["consumed"] < clock.consumed
        except (ValueError, KeyError, TypeError):
            is_before = False
        if is_before:
            kept.append(line)
    when = {"step": clock.step, "consumed": clock.consumed, "time": now()}
    kept.append(json.dumps(when | dict(values)))
    write_text(file, "\n".join(kept) + "\n", is_durable=False)
