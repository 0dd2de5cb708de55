"""Parts become what one process writes, to the last byte; what does not belong together is refused."""

import json
import os
import shutil

import pytest

from tests.small_tokenizer import write_other, write_tokenizer
from tide_megatron import api
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.data.preparation import filling, identity, origins, parallel_encoder
from tide_megatron.data.preparation.identity import TaskPart
from tide_megatron.data.preparation.sample import Encoder
from tide_megatron.data.sets import merging
from tide_megatron.launch.array import read_part


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(identity, "BLOCK", 4)


def line(number):
    if number % 11 == 7:
        return '{"messages": []}' if number % 2 else "{"
    reply = "abc " * (100 if number % 13 == 9 else number % 17 + 1)
    messages = [{"role": "user", "content": f"number {number}"}, {"role": "assistant", "content": reply}]
    return json.dumps({"messages": messages, "source": f"from {(number // 3) % 4}"})


@pytest.fixture
def inputs(tmp_path):
    write_tokenizer(tmp_path / "student")
    write_other(tmp_path / "teacher")
    for index, name in enumerate(("one", "two")):
        lines = [line(30 * index + number) for number in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def run(inputs):
    def run(name, part=None, **options):
        files = [inputs / "one.jsonl", inputs / "two.jsonl"]
        options = {"tokenizer": inputs / "student", "max_length": 128, "on_long": "truncate"} | options
        options = {"teachers": {"other": str(inputs / "teacher")}, "on_bad": "skip", "workers": 1} | options
        return api.prepare(inputs / "places" / name, files, part=part, **options)

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("total", [1, 2, 3, 7, 20])
def test_parts_in_any_order_are_the_whole(run, inputs, total):
    whole = run("whole")
    numbers = sorted(range(1, total + 1), key=lambda number: (number * 7) % 5)
    made = [run("out", f"{number}/{total}") for number in numbers]
    assert made[:-1] == [None] * (total - 1)
    assert made[-1] == whole
    assert contents(inputs / "places/out") == contents(inputs / "places/whole")
    assert whole.rejected
    assert len(whole.source_names) == 4
    merged = api.merge_data(inputs / "places/again", sorted((inputs / "places/out.parts").iterdir()))
    assert merged.digest == whole.digest
    assert contents(inputs / "places/again") == contents(inputs / "places/whole")


def test_words_beyond_the_limit_are_none_in_parts_too(run, inputs, monkeypatch):
    monkeypatch.setattr(origins, "MOST", 2)
    run("whole")
    for number in (1, 2, 3):
        run("out", f"{number}/3")
    assert contents(inputs / "places/out") == contents(inputs / "places/whole")
    assert json.loads((inputs / "places/out/manifest.json").read_text())["source_names"] == [
        "one.jsonl",
        "two.jsonl",
    ]


def test_a_part_goes_on_after_an_interrupt(run, inputs, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(filling, "COMMIT_SECONDS", 0.0)
    counted, encode = iter(range(1000)), Encoder.encode_all

    def failing(self, records):
        if records and next(counted) == 9:
            raise KeyboardInterrupt
        return encode(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(parallel_encoder, "PIECE", 1)
        patch.setattr(Encoder, "encode_all", failing)
        with pytest.raises(KeyboardInterrupt):
            run("out", "2/3")
    assert os.listdir(inputs / "places/out.parts") == [".2-of-3.partial"]
    for number in (2, 1, 3):
        run("out", f"{number}/3")
    assert "2-of-3: goes on behind record" in caplog.text
    run("whole")
    assert contents(inputs / "places/out") == contents(inputs / "places/whole")


def test_a_part_that_is_there_is_not_made_again(run, inputs, caplog):
    caplog.set_level("INFO")
    run("out", "1/2")
    before = (inputs / "places/out.parts/1-of-2/part.json").stat().st_mtime_ns
    run("out", "1/2")
    assert "1-of-2: is there already, from the same records" in caplog.text
    assert (inputs / "places/out.parts/1-of-2/part.json").stat().st_mtime_ns == before
    run("out", "1/2", max_length=64)
    assert (inputs / "places/out.parts/1-of-2/part.json").stat().st_mtime_ns != before
    (inputs / "one.jsonl").write_text((inputs / "one.jsonl").read_text().replace("number", "another"))
    before = (inputs / "places/out.parts/1-of-2/part.json").stat().st_mtime_ns
    run("out", "1/2", max_length=64)
    assert (inputs / "places/out.parts/1-of-2/part.json").stat().st_mtime_ns != before


def test_a_task_that_comes_again_leaves_the_whole_alone(run, inputs, caplog):
    caplog.set_level("INFO")
    for number in (1, 2):
        run("out", f"{number}/2")
    before = (inputs / "places/out/manifest.json").stat().st_mtime_ns
    assert run("out", "2/2") is None
    assert "out: is there already; to make it anew" in caplog.text
    assert (inputs / "places/out/manifest.json").stat().st_mtime_ns == before
    assert run("out", "2/2", replace=True) is not None


def test_two_tasks_that_finish_at_once_leave_it_to_one(run, inputs, monkeypatch, caplog):
    caplog.set_level("INFO")
    run("out", "1/2")

    def taken(*_arguments, **_options):
        raise merging.PlaceTaken("in use by another task")

    monkeypatch.setattr(merging, "merge", taken)
    assert run("out", "2/2") is None
    assert "all parts are there, another task puts them together (in use by" in caplog.text


def test_what_does_not_belong_together_is_refused(run, inputs):
    for number in (1, 2, 3):
        run("out", f"{number}/4")
    parts = sorted((inputs / "places/out.parts").iterdir())

    def refused(folders):
        with pytest.raises(DataError) as caught:
            api.merge_data(inputs / "places/merged", folders)
        assert not (inputs / "places/merged").exists()
        return str(caught.value)

    assert "of 4 parts these are missing: 4: prepare them (tide prepare ... --part 4/4)" in refused(parts)
    assert "part 1 is named twice" in refused([*parts, parts[0]])
    run("other", "4/4", max_length=64)
    other = inputs / "places/other.parts/4-of-4"
    assert "4-of-4: was prepared with another max_length, another list of teachers than" in refused(
        [*parts, other]
    )
    run("number", "1/3")
    assert "1-of-3: is one of 3 parts, " in refused([*parts, inputs / "places/number.parts/1-of-3"])
    run("whole")
    assert "is none: merge parts with parts" in refused([*parts, inputs / "places/whole"])
    (inputs / "two.jsonl").write_text("\n".join(line(number) for number in range(50, 90)))
    run("later", "4/4")
    assert "4-of-4: was prepared from other bytes of the sources" in refused(
        [*parts, inputs / "places/later.parts/4-of-4"]
    )


def test_a_damaged_part_is_refused(run, inputs):
    run("out", "1/1")
    shutil.rmtree(inputs / "places/out")
    part = inputs / "places/out.parts/1-of-1"
    content = (part / "ids.bin").read_bytes()
    (part / "ids.bin").write_bytes(b"\7" + content[1:])
    with pytest.raises(DataError, match=r"ids\.bin: is not what was written"):
        api.merge_data(inputs / "places/out", [part])
    (part / "ids.bin").write_bytes(content)
    (part / "part.json").write_text((part / "part.json").read_text().replace('"samples": ', '"samples": 1'))
    with pytest.raises(DataError, match="was edited"):
        api.merge_data(inputs / "places/out", [part])


def test_no_part_tells_a_machine_or_a_path(run, inputs):
    run("out", "1/2")
    for file in (inputs / "places/out.parts/1-of-2").glob("*.json*"):
        assert str(inputs) not in file.read_text()


def test_a_side_without_chunks_and_no_samples_are_seen_in_the_whole_only(run, inputs):
    for name in ("one", "two"):
        (inputs / f"{name}.jsonl").write_text(line(7))
    assert run("out", "1/2") is None
    with pytest.raises(DataError, match="no samples"):
        run("out", "2/2")


def test_a_pipe_has_no_parts(run, inputs):
    os.mkfifo(inputs / "pipe")
    with pytest.raises(DataError, match="a pipe can be read once"):
        api.prepare(
            inputs / "places/out", [inputs / "pipe"], tokenizer=inputs / "student", max_length=64, part="1/2"
        )


@pytest.mark.parametrize("word", ["", "1", "0/3", "4/3", "1/0", "a/b", "-1/3", "1/3/5"])
def test_no_part_is_refused(word):
    with pytest.raises(ConfigError, match="part"):
        TaskPart.read(word)


ARRAY = {"ID": "7", "MIN": "3", "MAX": "11", "STEP": "4", "COUNT": "3"}


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({f"SLURM_ARRAY_TASK_{name}": value for name, value in ARRAY.items()}, "2/3"),
        ({f"SLURM_ARRAY_TASK_{n}": v for n, v in ARRAY.items() if n != "STEP"} | {"SLURM_PROCID": "0"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "1/4"),
        ({"SLURM_PROCID": "x", "SLURM_NTASKS": "4"}, None),
        ({}, None),
    ],
)
def test_slurm_says_which_part(monkeypatch, variables, part):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_part("2/5") == "2/5"
    if part:
        assert read_part("slurm") == part
    else:
        with pytest.raises(ConfigError, match="part: slurm"):
            read_part("slurm")
