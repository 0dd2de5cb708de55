"""`tide plan`: which layouts of a recipe fit some numbers of GPUs, counted by our own step.

Candidates are ordered and thinned out by formulas (`candidates`); of the best that could fit, the fullest
rank is built and stepped on meta tensors (`one_rank`), and what it held and sent is the answer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import ConfigError, TideError
from tide_megatron.base.units import in_bytes
from tide_megatron.plan.candidates import Candidate, Field
from tide_megatron.plan.job import make_job, read_shapes, sample_length, with_choices
from tide_megatron.plan.one_rank import RankRecord, record_rank
from tide_megatron.plan.recorder import Sent
from tide_megatron.train.models import ModelShape
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import load_recipe

MOST_GPUS = 4096
"""Up to so many are looked at for what would do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan must know of the machines."""

    per_node: int = 8
    """GPUs of a node, among which messages need no network."""
    memory: int = 80_000_000_000
    """Bytes of a GPU."""
    reserve: int = 6_000_000_000
    """Bytes of it that the plan leaves alone: what it does not model."""

    @property
    def usable(self) -> int:
        """Bytes that a rank's tensors may take."""
        return self.memory - self.reserve


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteppedCandidate:
    """One candidate, recorded."""

    candidate: Candidate
    rank: int
    """That was stepped."""
    record: RankRecord
    machine: Machine
    field: Field
    """Where it was found."""

    @property
    def headroom(self) -> int:
        """Bytes that the fullest rank leaves of what it may take; negative: it does not fit."""
        return self.machine.usable - self.record.peak[1].num_bytes

    def sent(self) -> dict[str, int]:
        """Return the bytes that leave this rank in a step, by link: `node` or `network`."""
        found: Counter[str] = Counter({"node": 0, "network": 0})
        for what, size in self.record.num_bytes.items():
            if len(what.ranks) > 1:
                found[link_of(what.ranks, self.machine.per_node)] += leaving(what, size)
        return dict(found)

    def by_owner(self) -> dict[str, int]:
        """Return what the rank holds at its peak, by owner."""
        found: Counter[str] = Counter()
        for label, size in self.record.peak[1].by_label.items():
            found[label.owner] += size
        return dict(found.most_common())

    def plain(self) -> dict[str, Any]:
        """Return all of it as values of JSON."""
        phase, peak = self.record.peak
        return {
            "gpus": self.candidate.world,
            "overrides": self.candidate.words,
            "rank": self.rank,
            "fits": self.headroom >= 0,
            "peak_bytes": peak.num_bytes,
            "peak_phase": phase,
            "headroom_bytes": self.headroom,
            "by_owner": self.by_owner(),
            "at_peak": {f"{label.owner} {label.use}": size for label, size in sorted(peak.by_label.items())},
            "sent_bytes": self.sent(),
            "flops": {
                f"{label.owner} {label.use}": size for label, size in sorted(self.record.flops.items())
            },
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found for one number of GPUs."""

    gpus: int
    options: Sequence[SteppedCandidate]
    """Recorded, those that fit first, in the order in which they were tried."""
    looked_at: int
    """Candidates."""
    too_large: int
    """Of them: by weights, gradients and optimizer alone."""

    @property
    def best(self) -> SteppedCandidate | None:
        """The first that fits."""
        return next((option for option in self.options if option.headroom >= 0), None)


def link_of(ranks: Sequence[int], per_node: int) -> str:
    """Say over what a group talks: inside a node, or over the network where it has ranks of several."""
    return "node" if len({rank // per_node for rank in ranks}) == 1 else "network"


def leaving(what: Sent, given: int) -> int:
    """Return the bytes that leave a rank in a collective, by a ring or directly, of what it hands in.

    Args:
        what: the collective.
        given: bytes handed in, as the recorder counts them.
    """
    size = len(what.ranks)
    if what.kind.startswith("allreduce"):
        return 2 * given * (size - 1) // size
    if what.kind.startswith("allgather"):
        return given * (size - 1)
    if what.kind.startswith(("reduce_scatter", "alltoall")):
        return given * (size - 1) // size
    return 0 if what.kind == "recv" else given


def plan(
    file: Path,
    overrides: Sequence[str],
    gpus: Sequence[int],
    machine: Machine,
    *,
    length: int | None = None,
    records: int = 3,
) -> list[Answer]:
    """Plan a recipe for some numbers of GPUs. Not a collective; this process must be in no world.

    Args:
        file: YAML run file.
        overrides: `key=value`.
        gpus: numbers of GPUs, each with one rank.
        machine: what they are.
        length: tokens of a sample; None: `data.fixed_length`.
        records: how many candidates are stepped for each number.

    Raises:
        TideError: a folder without config.json, a batch that GPUs cannot share, no length; and where nothing
            fits anywhere, how many GPUs would do by weights.
    """
    # How many steps there are does not matter here, and epochs would ask for the data.
    recipe, _ = load_recipe(file, ["epochs=null", "steps=1", *overrides])
    shapes = read_shapes(recipe)
    tokens = sample_length(recipe, shapes, length)
    answers = [_answer(recipe, shapes, world, tokens, machine, records) for world in gpus]
    if not any(answer.options for answer in answers):
        raise ConfigError(_nothing_fits(recipe, shapes, tokens, machine, max(gpus)))
    return answers


def _answer(
    recipe: Recipe,
    shapes: Mapping[str, ModelShape],
    world: int,
    length: int,
    machine: Machine,
    records: int,
) -> Answer:
    field = Field(recipe=recipe, shapes=shapes, world=world, length=length, per_node=machine.per_node)
    found = field.candidates()
    possible = [one for one in found if one.least_bytes <= machine.usable]
    options = [_recorded(field, one, one.rank, machine) for one in _apart(possible, records)]
    return Answer(
        gpus=world,
        options=sorted(options, key=lambda option: option.headroom < 0),
        looked_at=len(found),
        too_large=len(found) - len(possible),
    )


def _recorded(field: Field, candidate: Candidate, rank: int, machine: Machine) -> SteppedCandidate:
    recipe = candidate.recipe(field.recipe)
    job = make_job(recipe, with_choices(field.shapes, recipe), world=field.world, length=field.length)
    logging.disable(logging.INFO)  # what a real rank would say when it starts
    try:
        record = record_rank(job, rank)
    finally:
        logging.disable(logging.NOTSET)
    return SteppedCandidate(candidate=candidate, rank=rank, record=record, machine=machine, field=field)


def explained(answers: Sequence[Answer], rank: int) -> SteppedCandidate:
    """Step another rank of the best layout, or of the first one where none fits.

    Raises:
        ConfigError: there is no such rank.
    """
    options = [option for answer in answers for option in answer.options]
    best = next((option for option in options if option.headroom >= 0), options[0])
    if rank >= best.candidate.world:
        raise ConfigError(f"--explain: {rank} is no rank of {best.candidate.world}; they count from 0")
    return best if rank == best.rank else _recorded(best.field, best.candidate, rank, best.machine)


def read_numbers(text: str) -> list[int]:
    """Read `--gpus`: whole numbers with commas.

    Raises:
        ConfigError: it is something else.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigError(f"--gpus: {text!r} are no numbers of GPUs; write them with commas, as in 8,16,64")
    return [int(word) for word in words]


def _apart(ordered: Sequence[Candidate], number: int) -> Iterator[Candidate]:
    """Yield the first candidates of different layouts; the last one is that which holds least by formula."""
    seen: set[tuple[str, ...]] = set()
    first: list[Candidate] = []
    for one in ordered:
        layouts = tuple(str(layout) for layout in one.layouts.values())
        if layouts not in seen and len(first) < max(1, number - 1):
            seen.add(layouts)
            first.append(one)
    yield from first
    if number > 1 and len(ordered) > len(first):
        # With recomputation and small microbatches it is what fits if anything does.
        last = min(ordered, key=lambda one: (one.least_bytes, not one.recompute, one.microbatch, one.score))
        if last not in first:
            yield last


def _nothing_fits(
    recipe: Recipe, shapes: Mapping[str, ModelShape], length: int, machine: Machine, most: int
) -> str:
    """Say what binds, and how many GPUs would do by weights, gradients and optimizer."""
    world, least = most, None
    while world <= MOST_GPUS:
        sized = dataclasses.replace(
            recipe, batch=dataclasses.replace(recipe.batch, samples=max(world, recipe.batch.samples))
        )
        field = Field(recipe=sized, shapes=shapes, world=world, length=length, per_node=machine.per_node)
        try:
            found = field.candidates()
        except TideError:
            found = []
        smallest = min(found, key=lambda one: one.least_bytes, default=None)
        if least is None:
            least = smallest
        if smallest is not None and smallest.least_bytes <= machine.usable:
            break
        world *= 2
    assert least is not None, "a model that is not cut at all is a candidate"
    part, size = max(least.parts.items(), key=lambda entry: entry[1])
    words = (
        f"no layout fits {most} GPUs of {in_bytes(machine.usable)} usable memory: the least that a fullest "
        f"rank holds is {in_bytes(least.least_bytes)}, most of it {part} ({in_bytes(size)}); "
    )
    if world > MOST_GPUS:
        return words + f"nor do up to {MOST_GPUS} GPUs; use larger ones, FP8 teachers or smaller models"
    return words + f"{world} GPUs could do, with batch.samples a multiple of that"
