"""Merged and divided data is what preparing the same records makes, and says so truly."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from tests.small_tokenizer import write_other, write_tokenizer
from tide_megatron import api
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.commands import app
from tide_megatron.data import columns
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.sets import set_merge, splitting


def record(number, source):
    reply = f"def f{number}():\n" + "    pass\n" * (40 if number % 9 == 5 else number % 5)
    messages = [{"role": "user", "content": f"number {number}"}, {"role": "assistant", "content": reply}]
    return json.dumps({"messages": messages} | ({"source": source} if source else {}))


@pytest.fixture
def root(tmp_path):
    write_tokenizer(tmp_path / "student")
    write_other(tmp_path / "teacher")
    return tmp_path


@pytest.fixture
def run(root):
    def run(name, files, **options):
        paths = []
        for file, lines in files.items():
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).write_text("\n".join(lines))
            paths.append(root / file)
        options = {"tokenizer": root / "student", "max_length": 96, "on_long": "truncate"} | options
        teachers = {"other": str(root / "teacher"), "same": str(root / "student")}
        return api.prepare(
            root / name, paths, **({"teachers": teachers, "on_bad": "skip", "workers": 1} | options)
        )

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


NAMED = [record(n, f"s{n % 3}") for n in range(20)] + ["{"]
MORE = ['{"messages": []}', *(record(n, f"s{n % 4 + 1}") for n in range(30, 50)), "{"]
PLAIN = [record(n, None) for n in range(60, 75)]


@pytest.mark.parametrize("samples", [3, 2**18])
@pytest.mark.parametrize(
    "files",
    [
        {"a": NAMED, "b": MORE},
        {"a": NAMED, "b": PLAIN, "c": MORE},
        {"a": PLAIN, "b": NAMED},
        {"a": PLAIN, "b": PLAIN},
        {"1/a": PLAIN, "2/a": PLAIN, "3/a": PLAIN},
    ],
)
def test_merged_sets_are_the_files_prepared_together(run, root, files, samples, monkeypatch):
    monkeypatch.setattr(set_merge, "_SAMPLES", samples)
    whole = run("whole", files)
    for name, lines in files.items():
        run(f"of-{name.replace('/', '-')}", {name: lines})
    parts = [root / f"of-{name.replace('/', '-')}" for name in files]
    assert api.merge_data(root / "merged", parts) == whole
    assert contents(root / "merged") == contents(root / "whole")
    assert PreparedData(root / "merged").manifest == whole


def test_sources_that_records_name_mean_the_same_in_all_sets(run, root):
    run("one", {"a": [record(n, "x") for n in range(4)]})
    run("two", {"b": [record(n, "x") for n in range(4)]})
    assert api.merge_data(root / "merged", [root / "one", root / "two"]).source_names == ["x"]


def test_sets_that_differ_are_refused(run, root):
    run("one", {"a": PLAIN})
    for said, options in {
        r"two: max_length differs from .*one \(64, not 96\)": {"max_length": 64},
        "on_long differs": {"on_long": "skip"},
        "tokenizer differs": {"tokenizer": root / "teacher", "max_length": 300},
        "teacher other differs": {"teachers": {"same": str(root / "student")}},
        "normalized differs": {"normalize": True},
    }.items():
        run("two", {"b": PLAIN}, replace=True, **options)
        with pytest.raises(DataError, match=said):
            api.merge_data(root / "merged", [root / "one", root / "two"])
    assert not (root / "merged").exists()


def test_damaged_sets_leave_nothing(run, root):
    run("one", {"a": PLAIN})
    content = (root / "one/ids.bin").read_bytes()
    (root / "one/ids.bin").write_bytes(content[:-1] + b"\7")
    before = sorted(path.name for path in root.iterdir())
    with pytest.raises(DataError, match=r"ids\.bin: is not what was written"):
        api.merge_data(root / "merged", [root / "one", root / "one"])
    with pytest.raises(DataError, match=r"ids\.bin: is not what was written"):
        api.split_data(root / "one", root / "x", root / "y", share=0.5)
    with pytest.raises(DataError, match="no prepared data"):
        api.merge_data(root / "merged", [root])
    assert sorted(path.name for path in root.iterdir()) == before


def true(manifest):
    """Return a manifest without what a division cannot count, and what it keeps of the whole."""
    statistics = dataclasses.replace(manifest.statistics, skipped={})
    sides = {name: dataclasses.replace(side, aligned_bytes=None) for name, side in manifest.sides.items()}
    return dataclasses.replace(manifest, statistics=statistics, sides=sides, sources=[], rejected={})


@pytest.mark.parametrize("values", [1, 2**23])
def test_a_source_that_is_split_off_is_what_its_records_make(run, root, values, monkeypatch):
    monkeypatch.setattr(splitting, "_VALUES", values)
    run("whole", {"a": NAMED + MORE + PLAIN})
    first, second = api.split_data(root / "whole", root / "x", root / "y", sources=["s1", "s3"])
    lines = [json.loads(line).get("source") for line in NAMED[:-1] + MORE[1:-1] + PLAIN]
    records = [line for line in NAMED + MORE + PLAIN if len(line) > 20]
    chosen = [line for line, said in zip(records, lines, strict=True) if said in ("s1", "s3")]
    rest = [line for line, said in zip(records, lines, strict=True) if said not in ("s1", "s3")]
    for name, manifest, kept in (("x", first, chosen), ("y", second, rest)):
        wanted = run(f"wanted-{name}", {"a": kept})
        assert true(manifest) == true(wanted)
        assert manifest.sides["same"].pairs == manifest.sides["same"].chunks > 0
        assert manifest.sources == PreparedData(root / "whole").manifest.sources
        for file in manifest.files:
            assert (root / name / file).read_bytes() == (root / f"wanted-{name}" / file).read_bytes(), file
        assert PreparedData(root / name).manifest == manifest
    assert set(first.source_names) == {"s1", "s3"}


@pytest.mark.parametrize(
    ("options", "number"), [({"share": 0.9}, 18), ({"samples": 3}, 3), ({"held_out": 5}, 15)]
)
def test_a_draw_gives_each_sample_to_one(run, root, options, number):
    run("whole", {"a": NAMED})
    whole = PreparedData(root / "whole")
    first, second = api.split_data(root / "whole", root / "x", root / "y", **options)
    assert (first.samples, second.samples) == (number, 20 - number)
    rows = [tuple(whole.row(n)["ids"].tolist()) for n in range(20)]
    halves = [
        [tuple(PreparedData(root / name).row(n)["ids"].tolist()) for n in range(count)]
        for name, count in (("x", number), ("y", 20 - number))
    ]
    assert sorted(halves[0] + halves[1]) == sorted(rows)
    assert all(half == [row for row in rows if row in half] for half in halves), "their order stays"
    api.split_data(root / "whole", root / "x2", root / "y2", **options)
    assert contents(root / "x") == contents(root / "x2")
    api.split_data(root / "whole", root / "x3", root / "y3", **options, seed=1)
    assert contents(root / "x") != contents(root / "x3")
    merged = api.merge_data(root / "again", [root / "x", root / "y"])
    assert true(merged).statistics == true(whole.manifest).statistics
    assert merged.sides["other"].aligned_bytes is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "say one of --share, --samples, --held-out and --source"),
        ({"share": 0.5, "samples": 3}, "say one of"),
        ({"share": 1.0}, "--share: 1.0 is no share"),
        ({"samples": 99}, "of 20 samples the first folder would get 20"),
        ({"held_out": 20}, "of 20 samples the first folder would get 0"),
        ({"sources": ["s7"]}, "has no source 's7'; did you mean|has no source 's7'"),
        ({"sources": ["s0", "s1", "s2"]}, "would get 20: leave some to both"),
    ],
)
def test_a_division_that_cannot_be_is_refused(run, root, options, said):
    run("whole", {"a": NAMED})
    with pytest.raises(ConfigError, match=said):
        api.split_data(root / "whole", root / "x", root / "y", **options)
    assert not (root / "x").exists()


def test_targets_are_replaced_only_when_asked(run, root):
    run("whole", {"a": NAMED})
    with pytest.raises(DataError, match="exists"):
        api.split_data(root / "whole", root / "x", root / "whole", share=0.5)
    assert not (root / "x").exists()
    with pytest.raises(ConfigError, match="named twice"):
        api.split_data(root / "whole", root / "x", root / "x", share=0.5)
    api.merge_data(root / "merged", [root / "whole"])
    with pytest.raises(DataError, match="exists"):
        api.merge_data(root / "merged", [root / "whole"])
    assert api.merge_data(root / "merged", [root / "whole", root / "whole"], replace=True).samples == 40


def test_data_that_was_taken_apart_is_shown_without_a_share(run, root):
    run("whole", {"a": NAMED})
    words = ["data", "split", str(root / "whole"), str(root / "x"), str(root / "y"), "--held-out", "5"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "an unknown share of the reply bytes" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["data", "inspect", str(root / "x"), "--html", str(root / "page.html")])
    assert "an unknown share" in " ".join(done.output.split())
    assert "an unknown share" in (root / "page.html").read_text()
    words = ["data", "merge", str(root / "z"), str(root / "x"), str(root / "y")]
    assert "20 samples" in " ".join(CliRunner().invoke(app, words).output.split())


def test_rows_are_copied_in_pieces(run, root, monkeypatch):
    run("whole", {"a": NAMED, "b": MORE})
    monkeypatch.setattr(columns, "_PIECE", 16)
    api.merge_data(root / "merged", [root / "whole", root / "whole"])
    assert (root / "merged/ids.bin").read_bytes() == 2 * (root / "whole/ids.bin").read_bytes()
