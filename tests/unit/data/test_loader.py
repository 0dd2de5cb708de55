"""The loader: one global order of samples however ranks and microbatches cut it, epochs, padding."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.small_tokenizer import write_chats
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.data.manifest import Manifest, TokenizerMetadata
from tide_megatron.data.order import order_of_epoch
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.diffusion.batch import IGNORED
from tide_megatron.parallel.layout import DataShard
from tide_megatron.text.chat import encode_chat


@pytest.fixture
def columns(prepared):
    return PreparedData(prepared)


def stream(columns, updates, *, world=1, accumulate=1, samples=12, start=0, seed=3):
    """Return (sample, epoch) in the order of the run, update by update, from all ranks."""
    loaders = [
        Loader(
            columns=columns,
            samples=samples,
            accumulate=accumulate,
            shard=DataShard(rank=rank, size=world),
            seed=seed,
        )
        for rank in range(world)
    ]
    seen = []
    for update in range(updates):
        consumed = start + update * loaders[0].update_samples
        for index, loader in itertools.product(range(accumulate), loaders):
            batch = loader.microbatch(consumed, index)
            seen.append(list(zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)))
    return [pair for batch in seen for pair in batch]


@pytest.mark.parametrize(
    ("world", "accumulate", "samples"), [(4, 1, 3), (2, 2, 3), (1, 4, 3), (3, 4, 1), (2, 1, 6)]
)
def test_every_cut_reads_the_same_samples(columns, world, accumulate, samples):
    cut = stream(columns, 6, world=world, accumulate=accumulate, samples=samples)
    assert cut == stream(columns, 6)


def test_ranks_take_turns_within_a_microbatch(columns):
    order = order_of_epoch(3, 0, 23).tolist()
    loader = Loader(columns=columns, samples=2, accumulate=2, shard=DataShard(rank=1, size=3), seed=3)
    assert loader.update_samples == 12
    assert loader.microbatch(0, 0).sample_ids.tolist() == order[2:4]
    assert loader.microbatch(0, 1).sample_ids.tolist() == order[8:10]
    assert loader.microbatch(12, 0).sample_ids.tolist() == order[14:16]
    assert [batch.sample_ids.tolist() for batch in loader.update(0)] == [order[2:4], order[8:10]]


def lengths(columns, samples, sides=(None,)):
    return columns.lengths(samples, sides).sum(axis=1).tolist()


@pytest.mark.parametrize(("world", "accumulate", "samples"), [(4, 1, 3), (2, 2, 3), (1, 4, 3), (3, 4, 1)])
def test_dealt_by_length_an_update_has_the_same_samples_and_like_stands_beside_like(
    columns, world, accumulate, samples
):
    whole = Loader(columns=columns, samples=12, seed=3, deal="length")
    for consumed in (0, 12, 36):
        wanted = whole.microbatch(consumed, 0)
        found = []
        for index, rank in itertools.product(range(accumulate), range(world)):
            shard = DataShard(rank=rank, size=world)
            batch = dataclasses.replace(whole, samples=samples, accumulate=accumulate, shard=shard)
            found.append(batch.microbatch(consumed, index))
        for name in ("sample_ids", "epochs"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in found]), getattr(wanted, name))
        ordered = Loader(columns=columns, samples=12, seed=3).microbatch(consumed, 0)
        pairs = [
            sorted(zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True))
            for batch in (wanted, ordered)
        ]
        assert pairs[0] == pairs[1], "the same update"
        dealt = lengths(columns, wanted.sample_ids.tolist())
        assert dealt == sorted(dealt, reverse=True) != lengths(columns, ordered.sample_ids.tolist())


def test_an_update_is_dealt_once(columns, monkeypatch):
    loader = Loader(columns=columns, samples=2, accumulate=6, seed=3, deal="length")
    wanted = [loader.microbatch(12, index).sample_ids.tolist() for index in range(6)]
    deals = iter([loader.dealt(12)])
    monkeypatch.setattr(Loader, "dealt", lambda self, consumed: next(deals))
    assert [batch.sample_ids.tolist() for batch in loader.update(12)] == wanted


def test_an_epoch_reads_every_sample_once_and_goes_on(columns):
    seen = stream(columns, 6)  # 72 positions over epochs of 23
    assert [epoch for _, epoch in seen] == [position // 23 for position in range(72)]
    epochs = [[sample for sample, _ in seen[23 * epoch : 23 * epoch + 23]] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_microbatch_may_hold_two_epochs(columns):
    batch = Loader(columns=columns, samples=6, seed=3).microbatch(20, 0)
    assert batch.epochs.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.sample_ids[3:].tolist() == order_of_epoch(3, 1, 23)[:3].tolist()


def test_resuming_is_starting_further_on(columns):
    assert stream(columns, 2, start=36) == stream(columns, 5)[36:]


def test_a_data_set_smaller_than_an_update_goes_round(columns):
    seen = stream(columns, 1, samples=60)
    assert [epoch for _, epoch in seen] == [0] * 23 + [1] * 23 + [2] * 14


def test_labels_and_bytes_belong_to_their_sample(columns, tokenizer):
    batch = Loader(columns=columns, samples=23, seed=1).microbatch(0, 0)
    for place, sample in enumerate(batch.sample_ids.tolist()):
        row = columns.row(sample)
        start, end = row["replies"].tolist()
        length = len(row["ids"])
        assert batch.ids[place, :length].tolist() == row["ids"].tolist()
        assert batch.labels[place, start:end].tolist() == row["ids"][start:].tolist()
        assert (batch.labels[place, :start] == IGNORED).all()
        assert (batch.labels[place, length:] == IGNORED).all()
        assert (batch.ids[place, length:] == tokenizer.pad_id).all()
        assert batch.reply_bytes[place] == row["reply_bytes"][0]
    assert batch.ids.shape[1] == columns.manifest.statistics.longest


def test_last_blocks_are_filled_with_learnt_end_tokens(columns, tokenizer):
    loader = Loader(columns=columns, samples=23, seed=1, block_size=8)
    batch = loader.microbatch(0, 0)
    assert batch.ids.shape[1] == loader.longest
    assert loader.longest % 8 == 0
    kinds = set()
    for place, sample in enumerate(batch.sample_ids.tolist()):
        length = len(columns.row(sample)["ids"])
        filled = -(-length // 8) * 8
        kinds.add(filled - length)
        assert (batch.ids[place, length:filled] == tokenizer.eos_id).all()
        assert (batch.labels[place, length:filled] == tokenizer.eos_id).all()
        assert (batch.ids[place, filled:] == tokenizer.pad_id).all()
        assert (batch.labels[place, filled:] == IGNORED).all()
    assert len(kinds) > 3
    assert torch.equal(batch.labels[batch.maskable], batch.ids[batch.maskable])


def test_length_follows_the_microbatch_or_is_fixed(columns):
    short = min(range(23), key=lambda sample: len(columns.row(sample)["ids"]))
    free = Loader(columns=columns, samples=1)
    fixed = Loader(columns=columns, samples=1, fixed_length=96)
    assert free.batch_of([short]).ids.shape == (1, len(columns.row(short)["ids"]))
    assert fixed.batch_of([short]).ids.shape == (1, 96)
    length = free.batch_of([short]).ids.shape[1]
    assert torch.equal(fixed.batch_of([short]).labels[:, :length], free.batch_of([short]).labels)


def test_evaluation_asks_for_rows(columns):
    batch = Loader(columns=columns, samples=4).batch_of([9, 2])
    assert batch.sample_ids.tolist() == [9, 2]
    assert batch.epochs.tolist() == [0, 0]
    assert batch.ids.dtype == batch.labels.dtype == batch.sample_ids.dtype == torch.int64


def test_sizes_that_cannot_be_are_refused(columns):
    longest = Loader(columns=columns, samples=1, block_size=16).longest
    with pytest.raises(ConfigError, match=f"fixed_length: {longest - 1} is below .* use {longest} or more"):
        Loader(columns=columns, samples=1, block_size=16, fixed_length=longest - 1)
    for name in ("samples", "accumulate", "block_size"):
        with pytest.raises(ConfigError, match=f"{name}: 0 is too few"):
            Loader(columns=columns, **({"samples": 1} | {name: 0}))


def test_an_id_that_a_reader_does_not_know_is_named_before_a_device_sees_it(columns):
    loader = Loader(columns=columns, samples=4)
    ids = loader.batch_of(range(23)).ids
    highest = int(ids.max())
    Loader(columns=columns, samples=4, known=(highest + 1, "student")).batch_of(range(23))
    sample = int((ids == highest).any(1).nonzero()[0])
    with pytest.raises(
        DataError,
        match=rf"prepared: sample {sample} has the token id {highest}, but teachers\.small knows the ids 0 "
        rf"to {highest - 1}; prepare the data again with its tokenizer$",
    ):
        Loader(columns=columns, samples=4, known=(highest, "teachers.small")).batch_of(range(23))


CHATS = [("short", "yes"), ("x", "word " * 40), ("y", "word " * 12), ("z", "two words")]


def cut_data(tokenizer, folder, max_length, on_long="truncate", *, of_an_earlier_release=False):
    """Prepare data that may be cut; return it with the tokens that each sample has uncut."""
    chats = write_chats(folder / "long.jsonl", CHATS)
    prepare([chats], tokenizer, folder / "data", max_length=max_length, on_long=on_long, replace=True)
    if of_an_earlier_release:
        drop_column(folder / "data", "cut")
    whole = [
        len(encode_chat(tokenizer, [{"role": "user", "content": a}, {"role": "assistant", "content": b}]).ids)
        for a, b in CHATS
    ]
    return PreparedData(folder / "data"), whole


def drop_column(folder, name):
    """Take a column from a data folder, as a release that did not know it would have written it."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["columns"][name], content["digest"], content["format"], content["version"]
    content["files"] = {file: kept for file, kept in content["files"].items() if Path(file).stem != name}
    Manifest(**content | {"tokenizer": TokenizerMetadata(**content["tokenizer"])}).write(folder)


@pytest.mark.parametrize("of_an_earlier_release", [False, True])
@pytest.mark.parametrize("block_size", [1, 8, 16])
@pytest.mark.parametrize("max_length", [35, 40, 41, 64, 70])
def test_a_sample_that_was_cut_is_filled_with_pads_that_nobody_learns(
    tokenizer, tmp_path, max_length, block_size, of_an_earlier_release
):
    columns, whole = cut_data(tokenizer, tmp_path, max_length, of_an_earlier_release=of_an_earlier_release)
    batch = Loader(columns=columns, samples=4, block_size=block_size).batch_of(range(4))
    assert sum(length > max_length for length in whole) == columns.manifest.statistics.truncated > 0
    for sample, length in enumerate(whole):
        kept = min(length, max_length)
        filled = -(-kept // block_size) * block_size
        token, label = (
            (tokenizer.pad_id, IGNORED) if length > max_length else (tokenizer.eos_id, tokenizer.eos_id)
        )
        assert batch.ids[sample, kept:filled].tolist() == [token] * (filled - kept)
        assert batch.labels[sample, kept:filled].tolist() == [label] * (filled - kept)
        assert batch.lengths[sample] == (kept if length > max_length else filled)


@pytest.mark.parametrize("on_long", ["truncate", "skip"])
def test_a_sample_that_just_fits_has_its_end(tokenizer, tmp_path, on_long):
    _, whole = cut_data(tokenizer, tmp_path, 200)
    columns, _ = cut_data(tokenizer, tmp_path, whole[2], on_long)
    place = 1 if on_long == "skip" else 2
    assert len(columns.row(place)["ids"]) == whole[2] == columns.manifest.max_length
    batch = Loader(columns=columns, samples=1, block_size=64).batch_of([place])
    assert (batch.labels[0, whole[2] :] == tokenizer.eos_id).all()
    assert batch.labels.shape[1] > whole[2]
