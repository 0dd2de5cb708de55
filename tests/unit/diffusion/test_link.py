"""What a teacher with its own tokens reads, is asked, and how its rows join the student's."""

import dataclasses

import pytest
import torch

from tests.unit.diffusion.sides import chunks_of, random_batch
from tide_megatron.diffusion.noise import Noiser

TIMES = (0.2, 0.6, 1.0)


def noised(seed, time):
    return Noiser(seed=seed).at(random_batch(seed), time)


def rows_of(chosen):
    """Number the chosen positions in (sample, position) order."""
    return {tuple(place): row for row, place in enumerate(chosen.nonzero().tolist())}


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("seed", range(4))
def test_the_teacher_hides_touched_chunks_and_is_asked_about_wholly_hidden_ones(seed, time):
    example = noised(seed, time)
    reading, side = example.reading("t0"), example.batch.sides["t0"]
    hidden, asked = torch.zeros_like(reading.masked), torch.zeros_like(reading.masked)
    for sample, students, teachers in chunks_of(side):
        hidden[sample, teachers] = bool(example.masked[sample, students].any())
        asked[sample, teachers] = bool(example.masked[sample, students].all())
    assert torch.equal(reading.masked, hidden)
    assert torch.equal(reading.targets, asked)
    assert torch.equal(reading.ids, side.ids)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_chunk_are_its_tokens_on_both_sides(seed, time):
    example = noised(seed, time)
    side, link, asked = example.batch.sides["t0"], example.link("t0"), example.reading("t0").targets
    mine, theirs = rows_of(example.masked), rows_of(asked)
    active = [entry for entry in chunks_of(side) if bool(example.masked[entry[0], entry[1]].all())]
    assert link.chunk_sample.tolist() == [sample for sample, _, _ in active]
    for (row, chunk), numbers, column in ((link.student_rows, mine, 1), (link.teacher_rows, theirs, 2)):
        wanted = [
            (numbers[entry[0], place], number)
            for number, entry in enumerate(active)
            for place in entry[column]
        ]
        assert list(zip(row.tolist(), chunk.tolist(), strict=True)) == wanted
    assert torch.equal(link.gold, side.ids[asked])


def test_pairs_are_single_tokens_of_one_id():
    example = noised(2, 1.0)
    side = example.batch.sides["t0"]
    ids = side.ids.clone()
    singles = [e for e in chunks_of(side) if len(e[1]) == len(e[2]) == 1]
    alike = singles[::2]
    for sample, (student,), (teacher,) in singles:
        ids[sample, teacher] = example.batch.ids[sample, student] + (
            0 if (sample, [student], [teacher]) in alike else 1
        )
    example = dataclasses.replace(
        example, batch=dataclasses.replace(example.batch, sides={"t0": dataclasses.replace(side, ids=ids)})
    )
    link = example.link("t0")
    mine, theirs = rows_of(example.masked), rows_of(example.reading("t0").targets)
    wanted = [
        (mine[sample, student], theirs[sample, teacher])
        for sample, (student,), (teacher,) in alike
        if bool(example.masked[sample, student])
    ]
    assert len(wanted) > 1
    assert list(zip(*(rows.tolist() for rows in link.pairs), strict=True)) == wanted
    assert link.num_pairs == len(wanted)
    gold = example.batch.ids[example.masked]
    assert torch.equal(gold[link.pairs[0]], link.gold[link.pairs[1]])
    samples = example.masked.nonzero()[:, 0]
    assert torch.equal(link.pair_sample, samples[link.pairs[0]])


def test_a_teacher_with_the_students_tokens_answers_row_by_row():
    example = noised(1, 0.6)
    link, reading = example.link("another"), example.reading("another")
    rows = int(example.masked.sum())
    assert link.pairs is None
    assert link.num_pairs == link.num_chunks == rows
    assert torch.equal(link.gold, example.batch.ids[example.masked])
    assert torch.equal(link.chunk_sample, example.masked.nonzero()[:, 0])
    assert torch.equal(reading.masked, example.masked)
    assert torch.equal(reading.targets, example.masked)


def test_nothing_hidden_is_nothing_asked():
    example = Noiser(seed=1).at(random_batch(1), 0.0)
    link = example.link("t0")
    assert (link.num_chunks, link.num_pairs, len(link.gold)) == (0, 0, 0)
    assert not example.reading("t0").masked.any()


def test_a_batch_moves_with_its_sides():
    batch = random_batch(1)
    moved = batch.to(torch.device("meta"))
    assert moved.sides["t0"].spans.device.type == moved.ids.device.type == "meta"
