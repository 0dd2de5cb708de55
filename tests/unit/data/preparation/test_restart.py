"""A preparation that something ended goes on to the same bytes, or begins anew and says why."""

import errno
import json
import os
import threading

import pytest

import prepare_kills
from tests.small_tokenizer import write_other
from tests.unit.data.conftest import PAIRS
from tide_megatron.base import unfinished
from tide_megatron.base.errors import DataError
from tide_megatron.data.preparation import filling, identity, parallel_encoder
from tide_megatron.data.preparation.parallel_encoder import EncoderKilled
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import Encoder, SideChoice
from tide_megatron.data.sources.record import Learn, Reading
from tide_megatron.text.tokenizer import Tokenizer

NUMBER = 20
"""The record at which something happens."""


@pytest.fixture(autouse=True)
def commits_at_every_record(monkeypatch):
    monkeypatch.setattr(filling, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # which only a lost machine would tell


@pytest.fixture
def lines():
    found = [
        json.dumps(
            {
                "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}],
                "source": f"s{n % 3}",
            }
        )
        for n, (ask, reply) in enumerate(PAIRS)
    ]
    found[5] = found[21] = "{"
    return found


@pytest.fixture
def source(tmp_path, lines):
    (tmp_path / "chats").mkdir()
    file = tmp_path / "chats/chats.jsonl"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def run(tmp_path, source, tokenizer):
    def run(name="out", **options):
        sides = {"other": SideChoice(tokenizer=tokenizer)}
        options = {"max_length": 128, "on_bad": "skip", "sides": sides, "workers": 1} | options
        given = options.pop("tokenizer", tokenizer)
        return prepare(options.pop("sources", [source]), given, tmp_path / "places" / name, **options)

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def entries(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def interrupted(monkeypatch, run, tmp_path):
    """End a first start at record NUMBER, so that its work is left; return the hidden folder."""
    end(monkeypatch, run, KeyboardInterrupt())
    assert entries(tmp_path / "places") == [".out.partial"]
    return tmp_path / "places/.out.partial"


def end(monkeypatch, run, error, kind=KeyboardInterrupt, **options):
    counted, encode = iter(range(1000)), Encoder.encode_all

    def failing(self, records):
        if records and next(counted) == NUMBER - 1:  # one record before it cannot be parsed
            raise error
        return encode(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(parallel_encoder, "PIECE", 1)
        patch.setattr(Encoder, "encode_all", failing)
        with pytest.raises(kind) as caught:
            run(**options)
    return str(caught.value)


def test_it_goes_on_to_the_same_bytes(run, tmp_path, interrupted, caplog):
    caplog.set_level("INFO")
    run("whole")
    caplog.clear()
    manifest = run()
    assert f"goes on behind record {NUMBER} of an earlier start" in caplog.text
    assert contents(tmp_path / "places/out") == contents(tmp_path / "places/whole")
    assert manifest.rejected == {"not JSON": 2}
    assert entries(tmp_path / "places") == ["out", "whole"]


def test_a_stop_says_how_it_goes_on(interrupted, caplog):
    said = [record.getMessage() for record in caplog.get_records("setup")]
    assert any(f"stopped; the same command goes on behind record {NUMBER}" in line for line in said)


def test_what_was_written_behind_the_last_commit_is_cut_off(run, tmp_path, interrupted):
    for file in ("data/ids.bin", "spool/ids.lengths", "spool/origins.bin", "data/rejects.jsonl"):
        with (interrupted / file).open("ab") as stream:
            stream.write(b"half of a ro")
    (interrupted / "data/ids.idx").write_bytes(b"of a kill in the last moment")
    (interrupted / "data/manifest.json").write_bytes(b"{")
    run("whole")
    run()
    assert contents(tmp_path / "places/out") == contents(tmp_path / "places/whole")


OTHERS = {
    "max_length": {"max_length": 64, "on_long": "truncate"},
    "on_bad": {"on_bad": "skip", "reading": Reading(normalize=True)},
    "learn": {"reading": Reading(learn=Learn.ALL)},
    "sides": {"sides": {}},
    "tokenizer": "other",
    "code": "code",
    "sources": "two",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_plan_begins_anew_and_says_why(run, tmp_path, interrupted, monkeypatch, caplog, source, kind):
    options = OTHERS[kind]
    if options == "other":
        options = {"tokenizer": Tokenizer.load(write_other(tmp_path / "other")), "max_length": 256}
    elif options == "code":
        monkeypatch.setattr(identity, "code_digest", lambda: "another")
        options = {}
    elif options == "two":
        options = {"sources": [source, source]}
    names = {
        "on_bad": "--normalize",
        "learn": "--learn",
        "sides": "list of teachers",
        "sources": "list of files",
    }
    said = names.get(kind, "release" if kind == "code" else kind)
    run(**options)
    assert "begins anew: it was made with another " in caplog.text
    assert said in caplog.text
    run("whole", **options)
    assert contents(tmp_path / "places/out") == contents(tmp_path / "places/whole")
    assert entries(tmp_path / "places") == ["out", "whole"]


def change_record(source, work):
    source.write_text(source.read_text().replace("f3", "g3"))


def add_blank_line(source, work):
    source.write_text("\n" + source.read_text())


def cut_source(source, work):
    source.write_text("\n".join(source.read_text().splitlines()[:7]))


def spoil_column(source, work):
    file = work / "data/ids.bin"
    file.write_bytes(file.read_bytes()[:100] + b"\0" + file.read_bytes()[101:])


def cut_column(source, work):
    (work / "spool/ids.lengths").write_bytes(b"")


def remove_column(source, work):
    (work / "data/ids.bin").unlink()


def spoil_state(source, work):
    (work / "state.json").write_text('{"files":')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_record, f"the first {NUMBER} records are others now"),
        (add_blank_line, f"the first {NUMBER} records are others now"),
        (cut_source, f"there are 7 records now, {NUMBER} were read before"),
        (spoil_column, "ids.bin has other bytes than were written"),
        (cut_column, "ids.lengths has other bytes than were written"),
        (remove_column, "ids.bin is missing"),
        (spoil_state, "state.json"),
    ],
)
def test_what_is_not_as_it_was_begins_anew(run, tmp_path, interrupted, source, caplog, change, said):
    change(source, interrupted)
    run()
    assert f"an earlier start's work is of no use, begins anew: {said}" in caplog.text
    run("whole")
    assert contents(tmp_path / "places/out") == contents(tmp_path / "places/whole")


def test_records_behind_the_place_may_be_others(run, tmp_path, interrupted, source, caplog):
    caplog.set_level("INFO")
    with source.open("a") as stream:
        stream.write("\n" + source.read_text().splitlines()[0])
    run()
    run("whole")
    assert "goes on behind" in caplog.text
    assert contents(tmp_path / "places/out") == contents(tmp_path / "places/whole")


def test_a_full_disk_says_how_it_goes_on(run, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls, write = iter(range(10_000)), unfinished.GrowingFile.write

    def failing(self, data):
        if next(calls) > 150:
            raise full
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.GrowingFile, "write", failing)
        with pytest.raises(DataError) as caught:
            run()
    assert "out: cannot be written (No space left on device); make room" in str(caught.value)
    assert "; the same command goes on behind record " in str(caught.value)
    run("whole")
    run()
    assert contents(tmp_path / "places/out") == contents(tmp_path / "places/whole")


def test_a_killed_encoder_says_how_it_goes_on(run, monkeypatch, tmp_path):
    killed = EncoderKilled("lines 3 and later: killed")
    said = end(monkeypatch, run, killed, kind=DataError)
    assert said == f"lines 3 and later: killed; the same command goes on behind record {NUMBER}"
    assert entries(tmp_path / "places") == [".out.partial"]


def test_bad_data_leaves_nothing_even_behind_a_commit(run, tmp_path, source):
    with pytest.raises(DataError, match="2 of 23 records are bad"):
        run(on_bad="stop")
    assert entries(tmp_path / "places") == []


def test_bad_data_ends_also_what_went_on(run, tmp_path, interrupted, source, lines):
    source.write_text("\n".join([*lines, lines[0].replace("return", "x" * 900)]))
    with pytest.raises(DataError, match=r"of 24 records are bad.*the longest has"):
        run(on_long="error")
    assert entries(tmp_path / "places") == []


def test_a_pipe_has_no_commits(run, tmp_path, monkeypatch, lines):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def feed():
        with pipe.open("w") as stream:
            stream.write("\n".join(lines))

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    end(monkeypatch, run, KeyboardInterrupt(), sources=[pipe])
    thread.join(10)
    assert entries(tmp_path / "places") == []


def test_without_a_commit_nothing_is_left(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(filling, "COMMIT_SECONDS", 60.0)
    end(monkeypatch, run, KeyboardInterrupt())
    assert "stopped; nothing was written" in caplog.text
    assert entries(tmp_path / "places") == []


def test_work_that_another_process_took_over_is_left_to_it(run, tmp_path, monkeypatch):
    lost = DataError("this process's lease was taken over")

    def check(self):
        if (tmp_path / "places/.out.partial/state.json").exists():
            raise lost

    monkeypatch.setattr("tide_megatron.base.lease.Lease.check", check)
    with pytest.raises(DataError, match="taken over"):
        run()
    assert ".out.partial" in entries(tmp_path / "places")


def test_three_kills_and_the_same_bytes(tmp_path):
    tally = prepare_kills.torment(tmp_path, kills=3, seed=4, records=120, by_time=0.0)
    assert not tally.wrong
    assert tally.went_on >= 2


def test_the_code_that_decides_bytes_is_found():
    named = {str(file).rpartition("tide_megatron/")[2] for file in identity.code_files()}
    assert {"text/align.py", "text/templates/places.py", "data/preparation/sample.py"} <= named
    assert any(name.endswith(".jinja") for name in named)


def test_other_code_has_another_digest(monkeypatch):
    first = identity.code_digest.__wrapped__()
    file = identity.code_files()[0]
    monkeypatch.setattr(identity, "code_files", lambda: [file])
    assert identity.code_digest.__wrapped__() != first
