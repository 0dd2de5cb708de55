"""Any number of processes writes the same bytes, faults of records included, and none is left behind."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_tokenizer import write_tokenizer
from tide_megatron.base.errors import ConfigError, DataError, RecordError
from tide_megatron.data.preparation import parallel_encoder
from tide_megatron.data.preparation.parallel_encoder import ParallelEncoder
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.rejects import TooLong
from tide_megatron.data.preparation.sample import Encoder, SideChoice, Window
from tide_megatron.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(parallel_encoder, "ALONE", 5)
    monkeypatch.setattr(parallel_encoder, "PIECE", 3)


def line(number):
    """Write a record; some are bad, some too long."""
    if number % 11 == 7:
        return '{"messages": []}'
    reply = "abc " * (400 if number % 13 == 9 else number % 17 + 1)
    messages = [{"role": "user", "content": f"number {number}"}, {"role": "assistant", "content": reply}]
    return json.dumps({"messages": messages, "source": f"from {number % 3}"})


@pytest.fixture
def files(tmp_path):
    found = [tmp_path / f"{name}.jsonl" for name in ("one", "two")]
    for index, file in enumerate(found):
        file.write_text("\n".join(line(40 * index + number) for number in range(40)) + "\n")
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def written(folder, files, tokenizer, number):
    sides = {"other": SideChoice(tokenizer=tokenizer)}
    options = {"max_length": 128, "on_long": "truncate", "on_bad": "skip", "sides": sides}
    prepare(files, tokenizer, folder, workers=number, **options)
    return contents(folder)


def test_any_number_of_processes_writes_the_same_bytes(tokenizer, files, tmp_path):
    alone = written(tmp_path / "alone", files, tokenizer, 1)
    assert json.loads(alone["manifest.json"])["samples"] > 60
    assert alone["rejects.jsonl"].count(b"\n") > 5
    assert written(tmp_path / "three", files, tokenizer, 3) == alone


def test_the_first_fault_ends_it_and_all_are_counted(tokenizer, files, tmp_path):
    faults = []
    for number in (1, 2):
        with pytest.raises(DataError) as caught:
            prepare(files, tokenizer, tmp_path / "out", max_length=128, workers=number)
        faults.append(str(caught.value))
    assert faults[0] == faults[1]
    assert "one.jsonl:8: no messages" in faults[0]
    assert "of 80 records are bad" in faults[0]


def test_a_process_that_is_killed_ends_it_with_the_line_and_the_remedy(tokenizer, tmp_path):
    def lines():
        for number in range(10_000):
            if number == 300:
                for process in pool._pool._processes.values():
                    os.kill(process.pid, signal.SIGKILL)
            yield number, line(1).encode()

    encoder = Encoder(tokenizer, Window.of(128, "truncate"), {})
    with (
        ParallelEncoder(encoder, number=2) as pool,
        pytest.raises(DataError, match=r"^lines \d+ and later: a process .* was killed .*--workers"),
    ):
        list(pool.encode(lines()))


def test_processes_hear_no_ctrl_c_and_end_with_the_preparation(tokenizer):
    encoder = Encoder(tokenizer, Window.of(128, "truncate"), {})
    with ParallelEncoder(encoder, number=2) as pool:
        list(pool.encode((number, line(1).encode()) for number in range(40)))
        processes = [process.pid for process in pool._pool._processes.values()]
        status = [Path(f"/proc/{pid}/status").read_text() for pid in processes]
    blocked = [int(re.search(r"^SigBlk:\s*(\w+)", text, re.MULTILINE)[1], 16) for text in status]
    assert all(mask >> (signal.SIGINT - 1) & 1 for mask in blocked), "Ctrl-C is the parent's, from the start"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


SCRIPT = """
from pathlib import Path
from tide_megatron import api
from tide_megatron.data.preparation import parallel_encoder
parallel_encoder.ALONE = 5
print("began")
print(api.prepare(Path("out"), ["two.jsonl"], tokenizer="tokenizer", max_length=128, on_bad="skip",
                  on_long="truncate", workers=2).samples)
"""
STOPPED = """
import os
from pathlib import Path
from tide_megatron.data.preparation import parallel_encoder
from tide_megatron.data.preparation.sample import Encoder, Window
from tide_megatron.text.tokenizer import Tokenizer

def lines():
    for number in range(1200):
        yield number, b"{}"
    raise KeyboardInterrupt

encoder = Encoder(Tokenizer.load(Path("tokenizer")), Window.of(128, "truncate"), {})
try:
    with parallel_encoder.ParallelEncoder(encoder, number=2) as pool:
        list(pool.encode(lines()))
except KeyboardInterrupt:
    print("stopped", flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("is_stdin", [False, True])
def test_a_script_needs_no_guard_and_may_be_stdin(is_stdin, files, tmp_path):
    assert said(SCRIPT, tmp_path, is_stdin=is_stdin)[0].split() == ["began", "36"]


def test_a_command_that_is_stopped_leaves_no_semaphores(tmp_path):
    assert said(STOPPED, tmp_path, is_stdin=False) == ("stopped\n", "")


def said(script, folder, *, is_stdin):
    """Run a script in a process of its own; return what it says on stdout and stderr."""
    (folder / "script.py").write_text(script)
    write_tokenizer(folder / "tokenizer")
    run = subprocess.run(
        [sys.executable, "-" if is_stdin else "script.py"],
        input=script,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])},
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def test_long_records_travel_in_small_pieces(tokenizer, monkeypatch):
    monkeypatch.setattr(parallel_encoder, "PIECE_BYTES", 100)
    lines = iter([(1, b"a" * 60), (2, b"b" * 60), (3, b"c"), (4, b"d"), (5, b"e"), (6, b"f")])
    pieces = [
        [number for number, _ in piece] for piece in iter(lambda: parallel_encoder._next_piece(lines), [])
    ]
    assert pieces == [[1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("error", [RecordError("no reply: add one", "no reply"), TooLong(300, 128)])
def test_faults_of_records_travel_whole(error):
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_no_processes_are_no_number():
    with pytest.raises(ConfigError, match=r"^workers: 0 is not a number of processes"):
        prepare([], None, Path("out"), max_length=128, workers=0)
