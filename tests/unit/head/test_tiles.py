"""Statistics that grow by tiles are those of the whole; a tile made is the tile read again."""

import pytest
import torch

from tide_megatron.head import tiles as module
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.softmax import OnlineSoftmax, merge
from tide_megatron.head.tiles import TiledHead, Workspace, likelihood_statistics, tiles

CPU = torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "CPU_TILE", 1)  # the least width, 128 columns, whatever the rows


def head_of(rows=7, columns=300, start=40, dtype=torch.float32):
    draw = torch.Generator().manual_seed(columns)
    hidden = torch.randn(rows, 5, generator=draw) * 30  # maxima of tiles differ by far
    weight = torch.randn(columns, 5, generator=draw)
    return HeadInput(hidden=hidden.to(dtype), weight=weight.to(dtype), start=start, vocabulary=500)


@pytest.mark.parametrize(("columns", "rows"), [(300, 7), (0, 7), (128, 1), (1, 3)])
def test_every_column_is_in_one_tile(small_tiles, columns, rows):
    bounds = list(tiles(columns, rows, CPU))
    assert [column for start, stop in bounds for column in range(start, stop)] == list(range(columns))
    assert all(stop - start <= 128 for start, stop in bounds)


def test_tiles_of_many_rows_are_narrow_and_never_below_the_least():
    widths = [max(stop - start for start, stop in tiles(10**6, rows, CPU)) for rows in (10, 425, 10**6)]
    assert widths[0] > widths[1] > widths[2] == 128
    assert all(width % 64 == 0 for width in widths)


def test_tiles_add_up_to_the_whole(small_tiles):
    head = head_of()
    logits = head.hidden @ head.weight.T
    gold = torch.tensor([40, 339, 200, 0, 499, 41, 100])  # the fourth and fifth are elsewhere
    seen = likelihood_statistics(TiledHead(head, head.hidden, None), gold)
    (found,) = merge([seen], [], None).likelihoods
    others = logits.masked_fill(torch.arange(40, 340) == gold[:, None], -torch.inf)
    torch.testing.assert_close(found.others.maximum + found.others.log_sum, others.logsumexp(-1))
    here = (gold >= 40) & (gold < 340)
    wanted = torch.where(here, logits[torch.arange(7), (gold - 40).clamp(0, 299)], 0.0)
    torch.testing.assert_close(found.logits, wanted)
    lse = found.softmax.maximum + found.softmax.log_sum
    torch.testing.assert_close(lse[here], logits.logsumexp(-1)[here])


def test_the_difference_is_the_mean_one():
    ours, theirs = torch.randn(2, 4, 90, generator=torch.Generator().manual_seed(1)) * 20
    softmax = OnlineSoftmax(4, CPU, has_difference=True)
    for start in range(0, 90, 25):
        softmax.add(ours[:, start : start + 25], theirs[:, start : start + 25])
    found = merge([], [softmax], None)
    torch.testing.assert_close(found.differences[0], (ours.softmax(-1) * (ours - theirs)).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_read_again_are_those_that_were_made(small_tiles, dtype):
    head = head_of(dtype=dtype)
    tiled = TiledHead(head, head.hidden, torch.empty(7 * 300, dtype=dtype))
    made = [tiled.make(*bounds) for bounds in tiles(300, 7, CPU)]
    again = [tiled.again(*bounds) for bounds in tiles(300, 7, CPU)]
    for first, second, (start, _) in zip(made, again, tiles(300, 7, CPU), strict=True):
        assert torch.equal(first.logits, second.logits)
        assert first.logits.dtype is torch.float32
        assert first.start == second.start == 40 + start
    whole = torch.cat([columns.logits for columns in made], dim=1)
    torch.testing.assert_close(whole, (head.hidden @ head.weight.T).float())


def test_a_workspace_keeps_its_buffers():
    space, kind = Workspace(), (torch.float32, CPU)
    first = space.take("a", 100, *kind)
    assert space.take("a", 50, *kind).data_ptr() == first.data_ptr()
    assert space.take("b", 50, *kind).data_ptr() != first.data_ptr()
    assert space.take("a", 101, *kind).numel() == 101
    assert space.take("a", 10, torch.bfloat16, CPU).dtype is torch.bfloat16
