"""The head's budget: defaults hold what they should on both kinds of device, and free memory decides."""

import logging

import pytest
import torch

from tide_megatron.base.errors import ConfigError
from tide_megatron.base.memory import free_bytes
from tide_megatron.head.budget import BUDGET_MIB, MIB, HeadShape, kept_heads, row_bytes, settle_budget
from tide_megatron.head.slabs import rows_within
from tide_megatron.head.tiles import fixed_bytes, tiles
from tide_megatron.losses.kl import Kl

GIB = 2**30
STUDENT, TEACHER = 151_936, 157_184


def rows_of_the_papers_pair(device, dtype):
    """Return how many rows a slab of the default budget has: Qwen3-0.6B under LLaDA2-mini, heads whole."""
    heads = {"student": HeadShape(STUDENT, dtype), "teacher": HeadShape(TEACHER, dtype)}
    row = row_bytes(
        kept_heads({"kl": Kl(teacher="teacher", shared_vocab_size=STUDENT)}, heads, is_exact=False), 1
    )
    return rows_within(BUDGET_MIB[device.type] * MIB, row, fixed_bytes(device))


def test_defaults_hold_what_they_should_on_both_kinds_of_device():
    assert rows_of_the_papers_pair(torch.device("cuda"), torch.bfloat16) >= 4096
    assert rows_of_the_papers_pair(torch.device("cuda"), torch.float32) >= 4096
    assert 300 <= rows_of_the_papers_pair(torch.device("cpu"), torch.bfloat16) <= 500
    assert 150 <= rows_of_the_papers_pair(torch.device("cpu"), torch.float32) <= 300


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [1, 100, 850, 3400, 9000])
def test_no_tile_of_many_columns_is_large(kind, rows):
    device = torch.device(kind)
    for start, stop in tiles(TEACHER, rows, device):
        assert (stop - start) * rows * 4 <= max(fixed_bytes(device) / 9, 128 * rows * 4)
        assert (stop - start) * 1024 * 4 <= 128 * MIB, "a tile's share of the weight's gradient"


@pytest.mark.parametrize("free", [[80 * GIB], [80 * GIB, 12 * GIB, 40 * GIB]])
def test_the_default_stands_where_there_is_enough(free):
    assert settle_budget(None, 6144, 577 * MIB, free, "cuda") == 6 * GIB


def test_the_default_gives_way_to_what_the_poorest_rank_has(caplog):
    with caplog.at_level(logging.WARNING):
        assert settle_budget(None, 6144, 577 * MIB, [80 * GIB, 5 * GIB], "cuda") == 2560 * MIB
    assert caplog.messages == [
        "head loss: slabs of 2560 MiB instead of 6144: "
        "rank 1 has 5120 MiB of cuda memory free beside its models"
    ]


def test_a_little_more_or_less_free_gives_the_same_slabs():
    found = {settle_budget(None, 6144, 577 * MIB, [5 * GIB + less * MIB], "cuda") for less in (0, 9, 100)}
    assert len(found) == 1


def test_the_default_takes_more_than_its_share_for_one_row():
    assert settle_budget(None, 6144, 577 * MIB, [600 * MIB], "cuda") == 577 * MIB


def test_a_default_for_which_not_even_one_row_fits_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"^head\.budget_mib: one row of the heads needs 577 MiB, but rank 0 has 500 MiB of cuda memory "
        r"free .*; use more head\.ranks, .*$",
    ):
        settle_budget(None, 6144, 577 * MIB, [500 * MIB], "cuda")


@pytest.mark.parametrize("wanted", [1, 4096])
def test_what_was_asked_for_and_is_there_is_taken_as_it_is(wanted):
    assert settle_budget(wanted, 6144, 577 * MIB, [4096 * MIB], "cuda") == wanted * MIB


def test_what_was_asked_for_and_is_not_there_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"^head\.budget_mib: 70000 MiB are more than there is, rank 1 has 61440 MiB of cuda memory "
        r"free beside its models; use at most 61440, or leave it out$",
    ):
        settle_budget(70_000, 6144, 577 * MIB, [80 * GIB, 60 * GIB], "cuda")


def test_free_memory_of_a_cpu_is_what_the_system_has():
    assert MIB < free_bytes(torch.device("cpu")) < 2**50


def test_free_memory_of_a_gpu_counts_what_the_allocator_holds_unused(monkeypatch):
    for name, value in {
        "mem_get_info": (100, 1000),
        "memory_reserved": 50,
        "memory_allocated": 20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda", 0)) == 130
