"""Blends: exact shares, each source epoch by epoch, the same samples whatever cuts an update."""

import collections
import dataclasses
import itertools
import math

import numpy
import pytest

from tests.small_tokenizer import write_chats, write_other
from tide_megatron.base.errors import ConfigError
from tide_megatron.data import blend as module
from tide_megatron.data.blend import BlendedData, BlendSource
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.parallel.layout import DataShard
from tide_megatron.text.tokenizer import Tokenizer

SIZES = {"code": 23, "chat": 40, "maths": 7}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("blend")
    from tests.small_tokenizer import write_tokenizer

    tokenizer = Tokenizer.load(write_tokenizer(place / "tokenizer"))
    for name, size in SIZES.items():
        pairs = [(f"{name} question {number}", f"{name} answer " + "x" * number) for number in range(size)]
        prepare([write_chats(place / f"{name}.jsonl", pairs)], tokenizer, place / name, max_length=256)
    return place


def blended(folders, seed=3, **options):
    return BlendedData(
        {
            name: (BlendSource(folder=str(folders / name), **values), PreparedData(folders / name))
            for name, values in options.items()
        },
        seed,
    )


WEIGHTS = {"code": {"weight": 0.5}, "chat": {"weight": 0.3}, "maths": {"weight": 0.2}}


def read(blend, positions, seed=3):
    """Return (source, its sample, epoch) at each position."""
    names = list(blend.members)
    found = []
    for sample, epoch in blend.samples_at(seed, positions):
        [number] = blend.sources_of(numpy.array([sample]))[1]
        found.append((names[number], sample - blend.members[names[number]].first, epoch))
    return found


def test_every_source_has_its_share_of_any_number_of_blocks(folders):
    blend = blended(folders, **WEIGHTS)
    seen = read(blend, range(10 * blend.block))
    for blocks in range(1, 11):
        positions = blocks * blend.block
        counts = collections.Counter(name for name, _, _ in seen[:positions])
        assert counts == blend.given(positions)
        for name, options in WEIGHTS.items():
            assert abs(counts[name] - options["weight"] * positions) < 1


def test_a_source_is_read_epoch_by_epoch(folders):
    seen = read(blended(folders, **WEIGHTS), range(1000))
    for name, size in SIZES.items():
        own = [(sample, epoch) for source, sample, epoch in seen if source == name]
        assert [epoch for _, epoch in own] == [place // size for place in range(len(own))]
        orders = [[sample for sample, epoch in own if epoch == wanted] for wanted in range(3)]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert orders[0] != orders[1] != orders[2]


def test_within_a_block_sources_are_shuffled(folders):
    seen = [name for name, _, _ in read(blended(folders, **WEIGHTS), range(512))]
    assert seen[:256] != seen[256:]
    runs = [len(list(group)) for _, group in itertools.groupby(seen)]
    assert max(runs) < 16  # in order, the first run would be 128 long


def test_a_position_is_read_by_itself(folders):
    blend = blended(folders, **WEIGHTS)
    places = [0, 700, 255, 256, 12_345, 1_000_003]
    assert blend.samples_at(3, places) == [blend.samples_at(3, [place])[0] for place in places]
    again = blended(folders, **WEIGHTS)
    assert again.samples_at(3, places) == blend.samples_at(3, places)
    assert again.samples_at(4, places) != blend.samples_at(3, places)


@pytest.mark.parametrize(("world", "accumulate", "samples"), [(4, 1, 15), (2, 5, 6), (1, 60, 1)])
def test_any_cut_reads_the_same_samples(folders, world, accumulate, samples):
    blend = blended(folders, **WEIGHTS)
    wanted = Loader(columns=blend, samples=60, seed=3).microbatch(240, 0)
    found = []
    for index, rank in itertools.product(range(accumulate), range(world)):
        shard = DataShard(rank=rank, size=world)
        loader = Loader(columns=blend, samples=samples, accumulate=accumulate, shard=shard, seed=3)
        batch = loader.microbatch(240, index)
        found += zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)
    assert found == list(zip(wanted.sample_ids.tolist(), wanted.epochs.tolist(), strict=True))
    assert len(set(found)) == 60, "a sample and its epoch stand for one draw of noise"


def test_rows_are_those_of_the_folder(folders):
    blend = blended(folders, **WEIGHTS)
    for sample, _ in blend.samples_at(3, range(40)):
        name, own = next((source, row) for source, row, _ in [read_one(blend, sample)])
        data = PreparedData(folders / name)
        assert all(numpy.array_equal(blend.row(sample)[key], values) for key, values in data.row(own).items())
        assert blend.lengths([sample], [None]).tolist() == data.lengths([own], [None]).tolist()
        assert blend.where(sample) == f"{folders / name}: sample {own}"


def read_one(blend, sample):
    [number] = blend.sources_of(numpy.array([sample]))[1]
    name = list(blend.members)[number]
    return name, sample - blend.members[name].first, None


def test_without_weights_sources_are_read_as_often_as_they_say(folders):
    blend = blended(folders, code={}, chat={"epochs": 0.5}, maths={"epochs": 4})
    assert blend.epoch_samples() == 23 + 20 + 28
    assert [float(end) for end in blend.ends] == pytest.approx([0, 23 / 71, 43 / 71, 1])
    assert blended(folders, **WEIGHTS).epoch_samples() is None


def test_a_new_source_leaves_the_others_orders(folders):
    two = read(blended(folders, code={"weight": 1}, chat={"weight": 1}), range(600))
    three = read(blended(folders, **{name: {"weight": 1} for name in SIZES}), range(900))
    for name in ("code", "chat"):
        own = [[part[1:] for part in seen if part[0] == name] for seen in (two, three)]
        shorter = min(map(len, own))
        assert shorter > 250
        assert own[0][:shorter] == own[1][:shorter]


def test_a_source_may_have_some_of_its_samples(folders):
    blend = blended(folders, code={"samples": 5}, chat={})
    assert len(blend) == 45
    seen = read(blend, range(450))
    assert len({sample for name, sample, _ in seen if name == "code"}) == 5
    assert sorted(blend.spread(1000).tolist()) == sorted(
        {blend.members[name].first + sample for name, sample, _ in seen}
    )
    assert len(blended(folders, code={"samples": 500}, chat={})) == 63


def test_one_source_of_a_folder(folders, tmp_path):
    tokenizer = Tokenizer.load(folders / "tokenizer")
    files = [folders / f"{name}.jsonl" for name in SIZES]
    prepare(files, tokenizer, tmp_path / "all", max_length=256)
    options = BlendSource(folder=str(tmp_path / "all"), source="chat.jsonl", weight=1.0)
    blend = BlendedData({"chat": (options, PreparedData(tmp_path / "all"))}, 3)
    assert len(blend) == 40
    assert {sample for sample, _ in blend.samples_at(3, range(40))} == set(range(23, 63))
    options = dataclasses.replace(options, source="chats.jsonl")
    with pytest.raises(ConfigError, match=r"^chat\.source: .* has no source 'chats.jsonl'; .*chat\.jsonl"):
        BlendedData({"chat": (options, PreparedData(tmp_path / "all"))}, 3)


def test_tiny_shares_make_longer_blocks(folders, monkeypatch):
    options = {"code": {"weight": 999}, "chat": {"weight": 1}}
    blend = blended(folders, **options)
    assert blend.block == 1000
    assert [blend.given(1000 * blocks)["chat"] for blocks in range(4)] == [0, 1, 2, 3]
    monkeypatch.setattr(module, "MOST_BLOCK", 500)
    with pytest.raises(ConfigError, match=r"^chat: its share of the samples, 0\.001, is too small"):
        blended(folders, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code": {"weight": 1}, "chat": {}}, r"^chat\.weight: code has one: give one to every source"),
        ({"code": {"weight": 1, "epochs": 2}}, r"^code: has both weight and epochs"),
    ],
)
def test_shares_that_cannot_be_are_refused(folders, options, message):
    with pytest.raises(ConfigError, match=message):
        blended(folders, **options)


def test_a_run_that_reads_a_source_too_often_is_refused(folders):
    blend = blended(folders, code={"weight": 1}, maths={"weight": 1, "most_epochs": 3})
    blend.check_epochs(42)
    with pytest.raises(ConfigError, match=r"^maths\.most_epochs: .* 3\.07 times, .* than 42 samples"):
        blend.check_epochs(43)


def test_the_digest_names_content_and_shares(folders):
    def digest(**options):
        return blended(folders, **options).digest

    first = digest(code={}, chat={})
    assert first == digest(code={}, chat={"epochs": 1})
    others = [
        digest(code={}, chat={"epochs": 2}),
        digest(code={}, maths={}),
        digest(chat={}, code={}),
        digest(code={"samples": 3}, chat={}),
    ]
    assert len({first, *others}) == 5


def test_sides_are_known_by_their_tokenizer(folders, tmp_path):
    student = Tokenizer.load(folders / "tokenizer")
    teacher = SideChoice(tokenizer=Tokenizer.load(write_other(tmp_path / "other")))
    opened = {}
    for name, side in (("code", "moe"), ("chat", "big")):
        file = folders / f"{name}.jsonl"
        prepare([file], student, tmp_path / name, max_length=256, sides={side: teacher})
        opened[name] = (BlendSource(folder=str(tmp_path / name)), PreparedData(tmp_path / name))
    blend = BlendedData(opened, 3)
    assert list(blend.sides) == ["moe"]
    assert blend.side_of(teacher.tokenizer.digest) == "moe"
    assert blend.longest("moe") == max(
        data.longest(side) for (_, data), side in zip(opened.values(), ("moe", "big"), strict=True)
    )
    for sample in (0, 23, 62):
        row, (name, own, _) = blend.row(sample), read_one(blend, sample)
        side = {"code": "moe", "chat": "big"}[name]
        theirs = PreparedData(tmp_path / name).row(own)
        assert {key for key in row if "." in key} == {
            f"moe.{part}" for part in ("ids", "replies", "cut", "chunks")
        }
        assert numpy.array_equal(row["moe.chunks"], theirs[f"{side}.chunks"])
        assert blend.lengths([sample], [None, "moe"]).tolist() == [
            [len(theirs["ids"]), len(theirs[f"{side}.ids"])]
        ]
    assert blend.without("moe") == []


def test_a_source_may_lack_a_side(folders, tmp_path):
    student = Tokenizer.load(folders / "tokenizer")
    teacher = SideChoice(tokenizer=Tokenizer.load(write_other(tmp_path / "other")))
    prepare([folders / "chat.jsonl"], student, tmp_path / "chat", max_length=256, sides={"moe": teacher})
    places = {"code": folders / "code", "chat": tmp_path / "chat"}
    blend = BlendedData(
        {name: (BlendSource(folder=str(place)), PreparedData(place)) for name, place in places.items()}, 3
    )
    assert list(blend.sides) == ["moe"]
    assert blend.without("moe") == ["code"]
    assert blend.tokenizer_of("moe").digest == teacher.tokenizer.digest
    assert blend.row(0)["moe.ids"].tolist() == [teacher.tokenizer.pad_id]
    assert blend.row(0)["moe.chunks"].size == 0 < blend.row(23)["moe.chunks"].size
    assert blend.lengths([0, 23], ["moe", None])[0].tolist() == [1, len(blend.row(0)["ids"])]
    assert blend.lengths([0, 23], ["moe", None])[1, 0] == len(blend.row(23)["moe.ids"])
    assert blend.spread(1000, "moe").tolist() == list(range(23, 63))
    assert blend.spread(1000).tolist() == list(range(63))


def test_counts_of_sources_never_fall(folders):
    blend = blended(folders, code={"weight": math.pi}, chat={"weight": 1e-3}, maths={"weight": math.e})
    counts = [list(blend.given(block * blend.block).values()) for block in range(200)]
    assert all(sum(row) == block * blend.block for block, row in enumerate(counts))
    assert all(
        later >= earlier
        for one, two in itertools.pairwise(counts)
        for earlier, later in zip(one, two, strict=True)
    )


def test_two_sources_of_one_folder_have_orders_of_their_own(folders):
    data = PreparedData(folders / "chat")
    options = BlendSource(folder=str(folders / "chat"), weight=1.0)
    seen = read(BlendedData({"one": (options, data), "two": (options, data)}, 3), range(256))
    one, two = ([sample for name, sample, _ in seen if name == wanted][:40] for wanted in ("one", "two"))
    assert sorted(one) == sorted(two) == list(range(40))
    assert one != two
