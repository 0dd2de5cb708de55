"""Data files: what they say, what goes before them; and the paper's, on files of its sets' columns."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.small_tables import chat, write_parquet
from tests.small_tokenizer import write_other, write_tokenizer
from tide_megatron import api
from tide_megatron.base.errors import ConfigError, DataError, TideError
from tide_megatron.base.options import options_of
from tide_megatron.commands import app
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.manifest import read_manifest
from tide_megatron.data.sources.choice import ColumnNames, Filters, SourceChoice
from tide_megatron.data.sources.mixture import DataMixture, chosen_mixture

ROOT = Path(__file__).parents[4]
PAPER = ROOT / "configs/data/paper.yaml"


def write_yaml(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.fixture
def places(tmp_path):
    write_tokenizer(tmp_path / "student")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(chat(n)) for n in range(20)))
    write_parquet(tmp_path / "b.parquet", [{"ask": f"ask {n}", "said": f"it is {n}"} for n in range(10, 30)])
    return tmp_path


def mixture(places, **more):
    return {
        "tokenizer": str(places / "student"),
        "max_length": 64,
        "sources": [
            {"path": str(places / "a.jsonl"), "name": "lines"},
            {"path": str(places / "b.parquet"), "columns": {"prompt": "ask", "response": "said"}},
        ],
        **more,
    }


def test_a_data_file_is_all_that_a_preparation_needs(places):
    file = write_yaml(places / "data.yaml", mixture(places))
    for words in (["--config", str(file)], [str(file)]):
        done = CliRunner().invoke(app, ["prepare", str(places / "out"), *words, "--replace"])
        assert done.exit_code == 0, done.output
        manifest = read_manifest(places / "out")
        assert manifest.samples == 40
        assert manifest.source_names == ["lines", "b.parquet"]
        assert manifest.sources[1]["options"] == {"columns": {"prompt": "ask", "response": "said"}}


def test_options_go_before_the_file(places):
    file = write_yaml(places / "data.yaml", mixture(places, on_long="truncate", dedup=True))
    plain = api.prepare(places / "plain", config=file)
    assert (plain.on_long, plain.max_length, plain.samples) == ("truncate", 64, 40)
    other = api.prepare(places / "other", config=file, max_length=32, on_long="skip", portion=(0.0, 0.5))
    assert (other.on_long, other.max_length) == ("skip", 32)
    assert 0 < other.samples < 40
    assert set(other.statistics.skipped) == {"outside portion"}
    words = ["prepare", str(places / "half"), str(file), "--portion", "0.5:1"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert read_manifest(places / "half").samples == 40 - other.samples


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sorces": []}, "sorces: unknown key; did you mean 'sources'?"),
        (
            {"sources": [{"path": "a", "shpae": "auto"}]},
            "sources.0.shpae: unknown key; did you mean 'shape'?",
        ),
        ({"sources": [{"path": "a", "filters": {"min_char": 1}}]}, "unknown key; did you mean 'min_chars'?"),
        ({"sources": [{"path": "a", "columns": {"promt": "x"}}]}, "unknown key; did you mean 'prompt'?"),
        ({"sources": [{"path": "a", "shape": "alpaca"}]}, "sources.0.shape: 'alpaca' is not valid"),
        ({"sources": [{"name": "a"}]}, "sources.0.path: is required; set it in the data file"),
        ({"sources": [{"path": ""}]}, "sources.0.path: '' is not valid"),
        ({"sources": [{"path": "a", "take": 0}]}, "sources.0.take: 0 is not valid"),
        ({"sources": [{"path": "a", "take_seed": 1}]}, "take_seed: goes with take"),
        ({"sources": "a.jsonl"}, "sources: 'a.jsonl' is not valid"),
        ({"portion": [0.9, 0.1]}, "portion: [0.9, 0.1] is empty"),
        ({"portion": [0, 2]}, "portion.1: 2 is not valid"),
        ({"max_length": "64"}, "max_length: '64' is not valid"),
        ({"dedup": 1}, "dedup: 1 is not valid"),
    ],
)
def test_what_a_data_file_cannot_say_is_refused_with_its_key(places, change, said):
    file = write_yaml(places / "data.yaml", mixture(places) | change)
    with pytest.raises(ConfigError) as caught:
        api.prepare(places / "out", config=file)
    assert str(caught.value).startswith(f"{file}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sources: [", "not readable as YAML"),
        ("3", "a data file is a mapping"),
        ("a: 1\na: 2", "not readable as YAML"),
        ("max_length: ${x}\nsources: []", "not found"),
        ("max_length: ???\nsources: []", "fix it there"),
    ],
)
def test_files_that_are_no_data_files_are_refused(tmp_path, content, said):
    file = write_yaml(tmp_path / "data.yaml", content)
    with pytest.raises(ConfigError, match=said):
        chosen_mixture([], file, "auto", {})


def test_what_nobody_says_is_asked_for(places):
    with pytest.raises(ConfigError, match="no such data file; check the path"):
        api.prepare(places / "out", config=places / "none.yaml")
    with pytest.raises(DataError, match="sources: there are none"):
        api.prepare(places / "out", tokenizer=places / "student", max_length=8)
    with pytest.raises(ConfigError, match="tokenizer: is required: give --tokenizer, or tokenizer in a data"):
        api.prepare(places / "out", [places / "a.jsonl"], max_length=8)
    with pytest.raises(ConfigError, match="max_length: is required: give --max-length"):
        api.prepare(places / "out", [places / "a.jsonl"], tokenizer=places / "student")
    file = write_yaml(places / "data.yaml", mixture(places))
    with pytest.raises(ConfigError, match="stand in the data file: name them there"):
        api.prepare(places / "out", [places / "a.jsonl"], config=file)
    with pytest.raises(ConfigError, match=r"sources\.0\.splt: unknown key; did you mean 'split'"):
        api.prepare(places / "out", ["hub:me/x,splt=train"], tokenizer="x", max_length=8)
    with pytest.raises(ConfigError, match="'alpaca' is not valid"):
        api.prepare(places / "out", [places / "a.jsonl"], tokenizer="x", max_length=8, shape="alpaca")
    done = CliRunner().invoke(app, ["prepare", str(places / "out"), str(file), "--portion", "half"])
    assert (done.exit_code, "is not FROM:TO" in done.output) == (2, True)


def test_shapes_and_duplicates_can_be_asked_for_without_a_file(places):
    words = [
        "prepare",
        str(places / "out"),
        str(places / "b.parquet"),
        "--tokenizer",
        str(places / "student"),
    ]
    done = CliRunner().invoke(app, [*words, "--max-length", "64"])
    assert isinstance(done.exception, TideError)
    assert "columns ask, said; known are" in str(done.exception)
    rows = [{"question": f"{n % 3}", "answer": "yes", "response": "no"} for n in range(6)]
    write_parquet(places / "b.parquet", rows)
    done = CliRunner().invoke(app, [*words, "--max-length", "64", "--dedup"])
    assert "answer and response can be one thing" in str(done.exception)
    (places / "c.jsonl").write_text("\n".join(json.dumps(row | {"prompt": "x"}) for row in rows))
    words[2] = str(places / "c.jsonl")
    done = CliRunner().invoke(app, [*words, "--max-length", "64", "--dedup", "--shape", "prompt_response"])
    assert done.exit_code == 0
    assert read_manifest(places / "out").samples == 1


def paper_sets(root):
    """Write small files of the four sets' columns, with texts of our own, where a download would lie."""
    turns = [chat(n)["messages"] for n in range(40)]
    system = {"role": "system", "content": "Be brief."}
    tulu = [
        {"id": f"t{n}", "messages": turns[n] if n % 2 else [system, *turns[n]], "source": "x/flan"}
        for n in range(20)
    ]
    tulu.append({"id": "cut", "messages": turns[39][:1], "source": "x/flan"})
    for shard in range(2):
        write_parquet(root / f"tulu/data/train-0000{shard}-of-00002.parquet", tulu[shard::2])
    smoltalk = [{"messages": turns[n] + turns[n + 1], "source": "magpie"} for n in range(20, 30)]
    for split, rows in (("train", smoltalk), ("test", smoltalk[:1])):
        write_parquet(root / f"smoltalk/data/all/{split}-00000-of-00001.parquet", rows)
    write_parquet(root / "smoltalk/data/longalign/train-00000-of-00001.parquet", smoltalk)
    stages = {
        "stage1": ("filtered_infinity_instruct", "largescale_diverse_instruct", "realuser_instruct"),
        "stage2": ("educational_instruct", "evol_instruct", "mceval_instruct", "package_instruct"),
    }
    for stage, configs in stages.items():
        for config in configs:
            rows = [
                {"instruction": f"write {config} {n}", "output": f"```{lang}\nx = {n}\n```", "tag": config}
                for n, lang in enumerate(("python", "java", "python", "Python"))
            ]
            more = {"code": "x = 1", "entry_point": "x", "testcase": ["assert x"]}
            rows = [row | (more if config == "educational_instruct" else {}) for row in rows]
            write_parquet(root / f"{stage}/data/{config}-00000-of-00001.parquet", rows)
        write_card(root / stage, {config: {"train": f"data/{config}-*"} for config in configs})
    files = {split: f"data/all/{split}-*" for split in ("train", "test")}
    write_card(root / "smoltalk", {"all": files, "longalign": {"train": "data/longalign/train-*"}})
    write_card(root / "tulu", {"default": {"train": "data/train-*"}})


def write_card(folder, configs):
    content = [
        {"config_name": name, "data_files": [{"split": s, "path": path} for s, path in files.items()]}
        for name, files in configs.items()
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': content})}---\n")


def test_the_papers_mixture_from_its_files_to_columns(tmp_path, monkeypatch):
    """The file as it stands, its four places alone taken to where the downloads lie."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    paper_sets(tmp_path / "sets")
    content = yaml.safe_load(PAPER.read_text())
    assert [source["path"] for source in content["sources"]] == [
        "hub:allenai/tulu-3-sft-mixture",
        "hub:HuggingFaceTB/smoltalk",
        "hub:OpenCoder-LLM/opc-sft-stage1",
        "hub:OpenCoder-LLM/opc-sft-stage2",
    ]
    for source, folder in zip(content["sources"], ("tulu", "smoltalk", "stage1", "stage2"), strict=True):
        source["path"] = str(tmp_path / "sets" / folder)
        source.pop("revision", None)
    file = write_yaml(tmp_path / "paper.yaml", content)
    teacher = f"{write_other(tmp_path / 'teacher')},max_length=1024"
    options = {"tokenizer": write_tokenizer(tmp_path / "student"), "teachers": {"llada": teacher}}
    manifest = api.prepare(tmp_path / "out", config=file, **options)
    assert (manifest.max_length, manifest.on_long) == (512, "truncate")
    data = PreparedData(tmp_path / "out")
    names, numbers = data.sources_of(data.spread(len(data)))
    assert [*names] == ["tulu", "smoltalk", "opencoder_1", "opencoder_2"]
    assert [numbers.tolist().count(n) for n in range(4)] == [20, 10, 6, 8]
    assert manifest.statistics.skipped == {"reply without 'python'": 14}
    assert manifest.rejected == {"no reply": 1}
    assert manifest.sides["llada"].chunks > 0
    halves = [
        api.prepare(tmp_path / name, config=file, portion=portion, **options).samples
        for name, portion in (("train", (0.0, 0.7)), ("held", (0.7, 1.0)))
    ]
    assert sum(halves) == manifest.samples
    assert min(halves) > 0


def test_the_papers_file_is_valid_as_it_stands():
    found = chosen_mixture([], PAPER, "auto", {})
    assert found.student == "models/qwen3-0.6b-bd3lm"
    assert sum(len(source.configs) for source in found.sources) == 9


def test_the_page_names_every_key():
    page = (ROOT / "docs/data.md").read_text()
    for kind in (DataMixture, SourceChoice, ColumnNames, Filters):
        for option in options_of(kind):
            assert f"`{option.name}`" in page, option.name


def test_tasks_that_share_a_mixture_write_what_one_would(places, monkeypatch):
    """What is left out counts among the records, so parts, draws and duplicates agree."""
    from tide_megatron.data.preparation import identity

    monkeypatch.setattr(identity, "BLOCK", 3)
    (places / "c.jsonl").write_text("\n".join(json.dumps(chat(n) if n % 5 else {"x": 1}) for n in range(40)))
    content = mixture(places, dedup=True, on_bad="skip", portion=[0.0, 0.9])
    content["sources"] += [{"path": str(places / "c.jsonl"), "take": 9, "take_seed": 2, "shape": "messages"}]
    file = write_yaml(places / "data.yaml", content)
    whole = api.prepare(places / "whole", config=file)
    assert {"duplicate", "outside portion", "beyond take"} <= set(whole.statistics.skipped)
    assert whole.rejected
    for number in (2, 3, 1):
        parts = api.prepare(places / "parts", config=file, part=f"{number}/3")
    assert parts.digest == whole.digest
    assert parts.files == whole.files
