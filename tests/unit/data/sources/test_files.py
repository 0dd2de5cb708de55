"""Which files a source means: globs, folders, splits, what `datasets` saved, the hub that cannot be had."""

import json
import types

import datasets
import pytest

from tests.small_tables import chat, write_arrow, write_parquet
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.sources.choice import SourceChoice
from tide_megatron.data.sources.opening import find_sources


def found(path, **options):
    [(_, paths)] = find_sources([SourceChoice(path=str(path), **options)]).files
    return [str(each).removeprefix(f"{path}/") for each in paths]


def numbers(path, **options):
    sources = find_sources([SourceChoice(path=str(path), **options)]).open()
    for source in sources:
        source.check()
    lines = [json.loads(line) for source in sources for _, line in source.lines()]
    return [int(line["messages"][0]["content"].split()[1]) for line in lines]


def test_shards_come_in_sorted_order(tmp_path):
    for name in ("b/1.parquet", "a.parquet", "b/0.parquet", "b/.hidden.parquet", ".cache/x.parquet"):
        write_parquet(tmp_path / "s" / name, [chat(1)])
    for name in ("c.jsonl.gz", "README.md", "notes.txt"):
        (tmp_path / "s" / name).write_text("")
    expected = ["a.parquet", "b/0.parquet", "b/1.parquet", "c.jsonl.gz"]
    assert found(tmp_path / "s") == expected
    glob = [name.rpartition("/s/")[2] for name in found(f"{tmp_path}/s/**/*.parquet")]
    assert glob == expected[:3]
    (tmp_path / "odd[1].jsonl").write_text("")
    assert found(tmp_path / "odd[1].jsonl") == [str(tmp_path / "odd[1].jsonl")]


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("none/*.parquet", {}, "no file has such a name"),
        ("empty", {}, "no data files in this folder"),
        ("split", {}, "holds the splits test and train: say which"),
        ("split", {"split": "trian"}, "no split 'trian'; did you mean 'train'"),
        ("split", {"config": "other", "split": "train"}, "config 'other'"),
        ("file.jsonl", {"split": "train"}, "is no folder, so it has no split"),
    ],
)
def test_what_is_not_there_or_not_clear_is_named(tmp_path, path, options, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.jsonl").write_text("")
    for name in ("train-00000.parquet", "test-00000.parquet"):
        write_parquet(tmp_path / "split/data" / name, [chat(1)])
    with pytest.raises(DataError) as caught:
        found(tmp_path / path, **options)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


CARD = """---
configs:
- config_name: all
  data_files:
  - {split: train, path: data/all/train-*}
  - {split: test, path: data/all/test-*}
- config_name: one
  data_files:
  - {split: train, path: data/one/*}
---
"""


def test_a_downloaded_data_set_is_read_as_its_card_says(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    for number, name in enumerate(("all/train-0", "all/train-1", "all/test-0", "one/train-0")):
        write_parquet(folder / f"data/{name}.parquet", [chat(number)])
    (folder / "README.md").write_text(CARD)
    assert numbers(folder, config="all", split="train") == [0, 1]
    assert numbers(folder, config="all", split="test") == [2]
    assert numbers(folder, config="one") == [3]
    assert numbers(folder, config=("one", "all"), split="train") == [3, 0, 1]
    with pytest.raises(DataError, match=r"config None: .*\['all', 'one'\]"):
        found(folder, split="train")
    with pytest.raises(DataError, match="holds the splits train, test: say which"):
        found(folder, config="all")


@pytest.mark.parametrize("shards", [1, 3])
def test_what_datasets_saved_is_read(tmp_path, shards, tokenizer):
    rows = [chat(n) for n in range(9)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=shards)
    assert numbers(tmp_path / "one") == list(range(9))
    datasets.DatasetDict({"train": data, "test": data.select([5])}).save_to_disk(tmp_path / "two")
    assert numbers(tmp_path / "two", split="test") == [5]
    data.select([7, 2]).save_to_disk(tmp_path / "index")
    assert numbers(tmp_path / "index") == [7, 2]
    for options, said in (
        ({}, "say which"),
        ({"split": "x"}, "no split 'x'"),
        ({"config": "x"}, "no config"),
    ):
        with pytest.raises(DataError, match=said):
            found(tmp_path / "two", **options)
    with pytest.raises(DataError, match="holds one split"):
        found(tmp_path / "one", split="train")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=r"\.arrow: no such file"):
        prepare([tmp_path / "one"], tokenizer, tmp_path / "out", max_length=64)
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json: cannot be read"):
        found(tmp_path / "one")


class Builder:
    """Stands in for what `datasets` finds on the hub."""

    def __init__(self, name, config, revision):
        self.asked = (name, config, revision)
        urls = [f"hf://datasets/{name}@c0ffee/data/{config}-{n}.parquet" for n in (0, 1)]
        self.config = types.SimpleNamespace(data_files={"train": urls, "test": urls[:1]})


def test_files_of_the_hub_are_fetched_by_their_commit(tmp_path, monkeypatch):
    asked = []

    def download(repository, name, *, repo_type, revision):
        asked.append((repository, name, repo_type, revision))
        return str(write_parquet(tmp_path / name, [chat(len(asked))]))

    def build(name, config, *, revision):
        assert (name, revision) == ("me/chats", "v1")
        return Builder(name, config, revision)

    monkeypatch.setattr(datasets, "load_dataset_builder", build)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert numbers("hub:me/chats", config=("x", "y"), split="train", revision="v1") == [1, 2, 3, 4]
    assert asked[:3] == [
        ("me/chats", f"data/{name}.parquet", "dataset", "c0ffee") for name in ("x-0", "x-1", "y-0")
    ]


def test_a_hub_that_cannot_be_reached_says_how_to_go_on(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        found("hub:me/chats", split="train")
    assert str(caught.value).startswith("hub:me/chats: cannot be had from the hub (")
    assert "hf download --repo-type dataset me/chats --local-dir datasets/chats`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_hub_that_is_no_table_is_refused(monkeypatch):
    builder = Builder("me/chats", "x", None)
    builder.config.data_files = {"train": ["hf://datasets/me/chats@c0ffee/data.csv"]}
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(DataError, match=r"data\.csv is of no kind that is read here"):
        found("hub:me/chats")


def test_two_sources_of_one_name_are_refused(tmp_path):
    choices = [SourceChoice(path=str(tmp_path / name), name="same") for name in "ab"]
    for name in "ab":
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match="two are called 'same'"):
        find_sources(choices)


def test_sources_know_whether_they_can_be_read_again(tmp_path):
    write_arrow(tmp_path / "a", [chat(1)])
    for path, is_so in ((tmp_path / "a", True), ("-", False)):
        [source] = find_sources([SourceChoice(path=str(path))]).open()
        assert source.can_be_read_again == is_so
