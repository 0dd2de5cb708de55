"""Rows as one vector and back, and rows of several ranks as those of one."""

import dataclasses

import pytest
import torch

from goldens.dense import loss_values
from tests.unit.diffusion.sides import random_batch
from tests.unit.losses.pairs import CLOCK, has_teacher
from tide_megatron.diffusion.alignment import RowAlignment, same_rows
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.head.gather import join_rows, num_packed, pack_rows, row_sizes, unpack_rows
from tide_megatron.losses import LOSSES
from tide_megatron.losses.rows import Rows, rows_of

NAMES = ["t0", "t1"]


def seat(seed, time=0.8, samples=3):
    batch = random_batch(seed, sides=2, samples=samples)
    return Noiser(seed=seed).at(batch, time)


def flat(value):
    """List every tensor of rows with the path to it."""
    if isinstance(value, torch.Tensor):
        return [("", value)]
    if dataclasses.is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, dict):
        parts = value
    elif value is None:
        return []
    else:
        parts = dict(enumerate(value))
    return [(f"{key}.{path}", tensor) for key, part in parts.items() for path, tensor in flat(part)]


def check_equal(found, wanted):
    found, wanted = dict(flat(found)), dict(flat(wanted))
    assert found.keys() == wanted.keys()
    for path, tensor in wanted.items():
        assert found[path].dtype == tensor.dtype, path
        assert torch.equal(found[path], tensor), path


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("time", [0.0, 0.5, 1.0])
def test_unpacking_reverses_packing(seed, time):
    rows = rows_of(seat(seed, time))
    rows = dataclasses.replace(rows, time=torch.rand(3) + 1e-7)
    sizes, packed = row_sizes(rows), pack_rows(rows)
    assert packed.dtype == torch.int64
    assert packed.shape == (num_packed(sizes, NAMES),)
    assert len(sizes) == 14
    assert all(isinstance(size, int) and size >= 0 for size in sizes)
    check_equal(unpack_rows(packed, sizes, NAMES[::-1]), rows)


def test_rows_without_links_and_links_without_pairs():
    rows = Rows(
        gold=torch.tensor([4, 9]),
        sample=torch.tensor([0, 1]),
        time=torch.tensor([0.1, 0.7]),
        maskable=torch.tensor([2, 3]),
    )
    assert row_sizes(rows) == [2, 2]
    check_equal(unpack_rows(pack_rows(rows), [2, 2], []), rows)
    linked = dataclasses.replace(rows, links={"t": same_rows(rows.gold, rows.sample)})
    sizes = row_sizes(linked)
    assert sizes == [2, 2, 2, 2, 2, 2, 2, 0]
    check_equal(unpack_rows(pack_rows(linked), sizes, ["t"]), linked)


def test_what_was_not_announced_is_refused():
    rows = rows_of(seat(0))
    with pytest.raises(AssertionError, match="announced"):
        unpack_rows(pack_rows(rows)[:-1], row_sizes(rows), NAMES)
    with pytest.raises(AssertionError, match="sizes for links"):
        num_packed(row_sizes(rows), ["t0"])
    with pytest.raises(AssertionError, match="different teachers"):
        join_rows([rows, dataclasses.replace(rows, links={})])


def test_joined_rows_by_hand():
    link = RowAlignment(
        gold=torch.tensor([7, 8, 9]),
        chunk_sample=torch.tensor([0, 1]),
        student_rows=(torch.tensor([0, 1]), torch.tensor([0, 1])),
        teacher_rows=(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])),
        pairs=(torch.tensor([1]), torch.tensor([2])),
        pair_sample=torch.tensor([1]),
    )
    rows = Rows(
        gold=torch.tensor([4, 5]),
        sample=torch.tensor([0, 1]),
        time=torch.tensor([0.5, 0.25]),
        maskable=torch.tensor([3, 2]),
        links={"t": link},
    )
    whole = join_rows([rows, rows])
    assert whole.gold.tolist() == [4, 5, 4, 5]
    assert whole.sample.tolist() == [0, 1, 2, 3]
    assert whole.time.tolist() == [0.5, 0.25, 0.5, 0.25]
    assert whole.maskable.tolist() == [3, 2, 3, 2]
    joined = whole.links["t"]
    assert joined.gold.tolist() == [7, 8, 9, 7, 8, 9]
    assert joined.chunk_sample.tolist() == [0, 1, 2, 3]
    assert [part.tolist() for part in joined.student_rows] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert [part.tolist() for part in joined.teacher_rows] == [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 3]]
    assert [part.tolist() for part in joined.pairs] == [[1, 3], [2, 5]]
    assert joined.pair_sample.tolist() == [1, 3]


def test_pairs_that_are_all_rows_stay_so_or_are_written_out():
    some = rows_of(seat(3))
    same = dataclasses.replace(some, links={name: same_rows(some.gold, some.sample) for name in NAMES})
    assert join_rows([same, same]).links["t0"].pairs is None
    mixed = join_rows([same, some]).links["t0"]
    rows = len(some.gold)
    wanted = [torch.cat([torch.arange(rows), part + rows]) for part in some.links["t0"].pairs]
    assert all(torch.equal(found, part) for found, part in zip(mixed.pairs, wanted, strict=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("teacher", ["t0", "same"])
def test_losses_on_joined_rows_are_the_parts_behind_each_other(name, teacher):
    """Coordinates 1 hides nothing; teacher `same` has no entry in `links` and answers row by row."""
    parts = [seat(1), seat(2, 0.0), seat(3, 0.6, samples=2)]
    kind = LOSSES[name]
    loss = kind(teacher=teacher) if has_teacher(kind) else kind()
    generator = torch.Generator().manual_seed(0)
    rows = [rows_of(part) for part in parts]
    draw = lambda count: torch.randn(count, 40, generator=generator)  # noqa: E731
    student = [draw(len(part.gold)) for part in rows]
    answers = [draw(len(part.link(teacher).gold)) for part in rows]
    whole = join_rows(rows)
    assert set(whole.links) == set(NAMES)
    found = loss_values(loss, torch.cat(student), torch.cat(answers), whole, CLOCK)
    each = [loss_values(loss, *three, CLOCK) for three in zip(student, answers, rows, strict=True)]
    assert len(found) == sum(map(len, each))
    torch.testing.assert_close(found, torch.cat(each))
    coefficients = torch.cat([loss.coefficients(part, CLOCK) for part in rows])
    torch.testing.assert_close(loss.coefficients(whole, CLOCK), coefficients)
    before = [0, 3, 6]
    samples = [loss.item_sample(part) + first for part, first in zip(rows, before, strict=True)]
    assert torch.equal(loss.item_sample(whole), torch.cat(samples))
