"""Chunks of a teacher with its own tokens: hidden whole, asked about, and joined with the student's rows."""

import dataclasses

import pytest
import torch

from tests.unit.diffusion.sides import chunks_of, random_batch
from tide_megatron.diffusion.alignment import mask_whole_chunks
from tide_megatron.diffusion.noise import Noiser

TIMES = (0.2, 0.6, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_members_are_the_tokens_of_each_chunk(seed):
    side = random_batch(seed).sides["t0"]
    for (chunk, sample, position), column in ((side.students(), 1), (side.teachers(), 2)):
        found = list(zip(chunk.tolist(), sample.tolist(), position.tolist(), strict=True))
        wanted = [
            (number, entry[0], place)
            for number, entry in enumerate(chunks_of(side))
            for place in entry[column]
        ]
        assert found == wanted


def closed_by_hand(hidden, maskable, sides):
    """Hide whatever shares a chunk with a masked token, until nothing changes."""
    wider = hidden.clone()
    while True:
        before = wider.clone()
        for side in sides:
            for sample, students, _ in chunks_of(side):
                if wider[sample, students].any():
                    wider[sample, students] |= maskable[sample, students]
        if torch.equal(before, wider):
            return wider


@pytest.mark.parametrize("sides", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_whole_hiding_closes_over_all_sides_and_spares_the_prompt(seed, sides):
    batch = random_batch(seed, sides=sides)
    drawn = Noiser(seed=seed).at(batch, 0.2).masked
    found = mask_whole_chunks(drawn, batch.maskable, list(batch.sides.values()))
    assert torch.equal(found, closed_by_hand(drawn, batch.maskable, batch.sides.values()))
    assert (drawn & ~found).sum() == 0
    assert (found & ~batch.maskable).sum() == 0


def test_several_sides_need_more_than_one_round():
    """Otherwise the test above could not see a single pass."""
    rounds = 0
    for seed in range(6):
        batch = random_batch(seed, sides=3)
        sides = list(batch.sides.values())
        drawn = Noiser(seed=seed).at(batch, 0.2).masked
        once = drawn
        for side in sides:
            once = mask_whole_chunks(once, batch.maskable, [side])
        rounds += not torch.equal(once, mask_whole_chunks(drawn, batch.maskable, sides))
    assert rounds > 0


def test_the_noiser_hides_whole_chunks_of_the_sides_it_is_told():
    batch = random_batch(1, sides=2)
    drawn = Noiser(seed=4)(batch)
    whole = Noiser(seed=4, whole_chunks_of=("t1",))(batch)
    assert torch.equal(whole.masked, mask_whole_chunks(drawn.masked, batch.maskable, [batch.sides["t1"]]))
    assert torch.equal(whole.time, drawn.time)
    assert whole.masked.sum() > drawn.masked.sum()


def test_a_side_without_chunks_changes_nothing():
    batch = random_batch(1)
    side = batch.sides["t0"]
    empty = type(side)(
        ids=side.ids,
        lengths=side.lengths,
        spans=side.spans[:0],
        sample=side.sample[:0],
        number=side.number[:0],
    )
    hidden = Noiser(seed=4)(batch).masked
    assert torch.equal(mask_whole_chunks(hidden, batch.maskable, [empty]), hidden)


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
