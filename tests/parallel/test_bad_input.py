"""Every bad input ends in one message that names key or file and remedy, and leaves nothing behind.

Each fault is planted into a copy of a tiny run. All of them are met on one rank; those that only one rank
of several can see are met by one of four; a few go through the command line to the exit code.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.parallel.bad_inputs import (
    FAULTS,
    LAYOUTS,
    attempt,
    cut,
    one_rank_sees,
    plant,
    write_an_id_beyond_all_vocabularies,
)
from tests.small_tokenizer import write_chats, write_other, write_tokenizer
from tests.tiny_run import (
    copy_tiny_run,
    teacher_config,
    write_cross_run,
    write_model,
    write_pair_run,
    write_tiny_run,
)
from tide_megatron import commands
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.lease import LEASE
from tide_megatron.base.stop import StopFlag
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.head import loss as head_loss
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.folder import claim_folder, held_folder
from tide_megatron.train.resolve import load_recipe

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 30

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("tiny") / "good")


@pytest.fixture(autouse=True)
def no_ranks_around(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tide(monkeypatch, capsys):
    """Give `tide(*words) -> (exit code, what was said on stderr)`, in this process."""
    monkeypatch.setattr(commands, "start_log", lambda: None)  # its handlers would outlive the test

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            commands.main()
        return caught.value.code, capsys.readouterr().err

    return call


def everything(folder):
    """Return all paths, and when each file was written: a lease comes into a folder and goes."""
    return {
        str(path.relative_to(folder)): path.is_file() and path.stat().st_mtime_ns
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_with_its_place_and_remedy_and_leaves_nothing(pool, tiny, tmp_path, name):
    fault, kind, said = FAULTS[name]
    file = copy_tiny_run(tiny, tmp_path / "bad")
    words = plant(fault, file.parent)
    before = everything(tmp_path)
    (answer,) = pool(1).run(attempt, file, words)
    assert answer is not None, "the run went on"
    assert answer[0] == f"{kind}Error"
    assert re.search(said, answer[1]), answer[1]
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_cannot_be_is_refused_on_every_rank_before_anything_is_read(pool, tmp_path, name):
    words, said = LAYOUTS[name]
    file = write_pair_run(tmp_path / "pair")
    write_model(file.parent / "narrow", teacher_config(320, 8) | {"moe_intermediate_size": 18}, seed=3)
    before = everything(tmp_path)
    for answer in pool(4).run(attempt, file, [word.format(run=file.parent) for word in words]):
        assert answer is not None, "the run went on"
        assert answer[0] == "ConfigError"
        assert re.search(said, answer[1]), answer[1]
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", ["reverse_kl", "tidal", "calm", "reverse_calm", "calm_tidal"])
def test_every_loss_that_compares_by_id_needs_the_same_ids(pool, tiny, tmp_path, kind):
    fault, _, said = FAULTS["shared ids that differ"]
    if "calm" in kind:
        said = r"^losses\.kl: teacher 'moe' has another vocabulary .* run `tide prepare` .*--teacher moe="
    file = copy_tiny_run(tiny, tmp_path / "bad")
    plant(fault, file.parent)
    (answer,) = pool(1).run(attempt, file, [f"losses.kl.kind={kind}"])
    assert answer is not None, "the run went on"
    assert re.search(said, answer[1]), answer[1]


CROSS_FAULTS = {
    "data without the teacher's side": (
        ["data.train={0}/data/plain"],
        r"^losses\.reverse: teacher 'own' has another vocabulary .* --teacher own=",
    ),
    "kl between two vocabularies": (
        ["losses.kl.teacher=own", "losses.tidal={{kind: tidal, teacher: moe}}"],
        r"^losses\.kl: \d+ of the first 3\d\d ids are different bytes",
    ),
    "chunks of a side that is not there": (
        ["noise.chunks_of=[othr]"],
        r"^data\.train: .* has no side 'othr', which noise\.chunks_of names; did you mean 'other'",
    ),
    "a share that is none": (["teachers.own.shown_share=1.5"], r"^teachers\.own\.shown_share: "),
    "an unknown view": (["teachers.own.view=complementry"], r"^teachers\.own\.view: .*complementary"),
    "a mask token that the teacher's tokenizer lacks": (
        ["teachers.own.folder={0}/small", "teachers.own.mask=<|veil|>"],
        r"^teachers\.own: .*the mask token '<\|veil\|>' is not in the vocabulary: .* perhaps '<\|mask\|>'",
    ),
}


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    """Return a run with two tokenizers, and beside it data without sides and a teacher with few rows."""
    file = write_cross_run(tmp_path_factory.mktemp("cross"))
    folder = file.parent
    tokenizer = Tokenizer.load(folder / "student")
    prepare([folder / "train.jsonl"], tokenizer, folder / "data/plain", max_length=128)
    write_model(folder / "small", teacher_config(284, 4), seed=5)
    write_other(folder / "small")
    return file


@pytest.mark.parametrize("name", CROSS_FAULTS)
def test_faults_with_two_tokenizers_are_one_message(pool, cross, name):
    words, said = CROSS_FAULTS[name]
    (answer,) = pool(1).run(attempt, cross, [word.format(cross.parent) for word in words])
    assert answer is not None, "the run went on"
    assert re.search(said, answer[1]), answer[1]
    assert not (cross.parent / "run").exists()


def attempt_with_one_poor_rank(file, words, poor):
    """Train where one rank's device is as good as full."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == poor:
            patch.setattr(head_loss, "free_bytes", lambda device: 40 * 2**20)
        return attempt(file, words)


def test_a_head_budget_that_one_rank_has_not_free_is_refused_on_all(pool, tiny, tmp_path):
    file = copy_tiny_run(tiny, tmp_path / "bad")
    before = everything(tmp_path)
    said = "head.budget_mib: 60 MiB are more than there is, rank 2 has 40 MiB of cpu memory free beside its "
    said += "models; use at most 40, or leave it out"
    answers = pool(4).run(attempt_with_one_poor_rank, file, ["head.budget_mib=60"], 2)
    assert answers == [("ConfigError", said)] * 4
    assert everything(tmp_path) == before


def test_an_id_that_no_model_knows_is_named_when_it_is_read(pool, tiny, tmp_path):
    file = copy_tiny_run(tiny, tmp_path / "bad")
    plant(write_an_id_beyond_all_vocabularies, file.parent)
    (answer,) = pool(1).run(attempt, file, [])
    assert answer is not None, "the run went on"
    assert re.search(
        r"data/train: sample \d+ has the token id 70000, but student knows the ids 0 to 319; prepare",
        answer[1],
    ), answer[1]


def test_the_run_without_a_fault_goes_on(pool, tiny, tmp_path):
    """Else the faults above would prove nothing."""
    file = copy_tiny_run(tiny, tmp_path / "good")
    assert pool(1).run(attempt, file, ["steps=1"]) == [None]
    assert json.loads((tmp_path / "good/run/result.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("name", "rank", "where"),
    [
        ("truncated weights", 2, r"teachers\.moe\.folder \(model\.safetensors\)"),
        ("no tokenizer", 1, r"student\.folder \(tokenizer\.json\)"),
        ("shared ids that differ", 0, r"teachers\.moe\.folder \(tokenizer\.json\)"),
        ("a data file cut in the middle", 3, r"data\.train \(ids\.bin\)"),
        ("columns that disagree", 1, r"data\.train \(manifest\.json, replies\.bin\)"),
    ],
)
def test_a_fault_that_one_of_four_ranks_sees_ends_them_all_soon(tiny, tmp_path, name, rank, where):
    """It is told as a copy that differs, with its key, its files and its rank."""
    fault, _, _ = FAULTS[name]
    bad = copy_tiny_run(tiny, tmp_path / "bad")
    words = plant(fault, bad.parent)
    before = everything(tmp_path)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"^{where}: differs between ranks: rank {rank} "):
        run_ranks(one_rank_sees, (tiny, bad, words, rank, tmp_path / "run"), 4, "cpu")
    assert time.monotonic() - start < MOST_SECONDS
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["teachers.moe.layout.expert=3"],
            r"teachers\.moe\.layout \{expert=3\}: .* nearest legal layout is .*",
        ),
        (["batch.samples=6"], r"batch\.samples: 6 samples .* by 4 ranks; use 8, or another number of ranks"),
        (["losses.kl.temprature=2"], r"losses\.kl\.temprature: unknown key; did you mean 'temperature'\?"),
        (
            ["student.folder=nowhere"],
            r"nowhere: no such model folder; give a local folder with config\.json in it",
        ),
    ],
)
def test_the_command_says_one_line_on_four_ranks_and_fails(tide, tiny, tmp_path, words, said):
    start = time.monotonic()
    code, complaint = tide("train", tiny, "--ranks", 4, "--folder", tmp_path / "run", *words)
    assert time.monotonic() - start < MOST_SECONDS
    assert code == 2
    assert re.fullmatch(f"error: {said}\n", complaint), complaint
    assert not any(tmp_path.iterdir())


def test_another_number_of_ranks_than_torchrun_started_is_refused(tide, tiny, monkeypatch):
    told = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29555",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    code, complaint = tide("train", tiny, "--ranks", 4)
    assert code == 2
    assert complaint.startswith(
        "error: ranks: this command is to run on 4 ranks, but torchrun or srun started 2 processes of it; "
    )


def test_the_run_folder_of_another_recipe_is_refused_and_stays_as_it_is(tide, tiny, tmp_path):
    """Only rank 0 looks at the folder."""
    claim_folder(tmp_path / "run", load_recipe(tiny, ["seed=77"])[1], resume=True)
    (tmp_path / "run/checkpoints").mkdir()
    before = everything(tmp_path)
    code, complaint = tide("train", tiny, "--ranks", 4, "--folder", tmp_path / "run")
    assert code == 2
    assert complaint.startswith(
        f"error: folder: {tmp_path / 'run'} holds the run of another recipe:\n  seed: 77 -> 3\n"
    )
    assert "--fresh" in complaint
    assert everything(tmp_path) == before


@pytest.mark.parametrize("words", [[], ["--fresh"], ["seed=9", "--fresh"]])
def test_a_living_run_is_not_disturbed(tide, tiny, tmp_path, words):
    folder = tmp_path / "run"
    with held_folder(folder, load_recipe(tiny)[1], resume=True, stop=StopFlag()):
        claim_folder(folder, load_recipe(tiny)[1], resume=True)
        (folder / "checkpoints/step-1.partial").mkdir(parents=True)
        before = everything(tmp_path)
        code, complaint = tide("train", tiny, "--folder", folder, *words)
        assert code == 2
        said = (
            rf"error: folder: {folder}: in use by host {os.uname().nodename}, pid {os.getpid()}.*; wait .*\n"
        )
        assert re.fullmatch(said, complaint), complaint
        assert everything(tmp_path) == before
    assert not (folder / LEASE).exists()


def test_fresh_discards_an_old_run_only_for_one_that_can_start(tide, tiny, tmp_path):
    claim_folder(tmp_path / "run", load_recipe(tiny, ["seed=77"])[1], resume=True)
    (tmp_path / "run/checkpoints/step-1").mkdir(parents=True)
    before = everything(tmp_path)
    code, _ = tide("train", tiny, "--fresh", "--folder", tmp_path / "run", "data.train=nowhere")
    assert code == 2
    assert everything(tmp_path) == before


def test_a_process_of_its_own_ends_with_the_code_and_without_a_traceback(tiny, tmp_path):
    bad = copy_tiny_run(tiny, tmp_path / "bad")
    cut("teacher/model.safetensors")(bad.parent)
    before = everything(tmp_path)
    command = [sys.executable, "-m", "tide_megatron.commands", "train", str(bad), "--ranks", "4"]
    command += ["teachers.moe.layout.expert=4"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("error") == 1
    assert re.search(
        r"^error: .*teacher/model\.safetensors: damaged or truncated .*again\n\Z", done.stderr, re.M
    )
    assert everything(tmp_path) == before


RECORD = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}]}
BAD_RECORDS = {
    "no records": ("", r"bad\.jsonl: no samples .*empty\): give records"),
    "no reply": (
        json.dumps({"messages": RECORD["messages"][:1]}),
        r"bad\.jsonl:2: no reply: the last message must be the assistant's",
    ),
    "an empty reply": (
        json.dumps({"messages": [RECORD["messages"][0], {"role": "assistant", "content": " "}]}),
        r"bad\.jsonl:2: message 2: the assistant's content is empty: fill it or remove the record",
    ),
    "too long": (
        json.dumps({"messages": [RECORD["messages"][0], {"role": "assistant", "content": "long " * 90}]}),
        r"bad\.jsonl:2: \d+ tokens, max_length is 64: raise max_length to \d+ or more, or leave such",
    ),
    "a line cut in the middle": (
        json.dumps(RECORD)[:40],
        r"bad\.jsonl:2: not JSON .*: write one JSON object per line",
    ),
    "no such role": (
        json.dumps({"messages": [{"role": "usr", "content": "x"}]}),
        r"bad\.jsonl:2: message 1: unknown role 'usr': did you mean 'user'\?",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_told_with_its_line_and_no_data_is_left(tide, tmp_path, name):
    line, said = BAD_RECORDS[name]
    write_tokenizer(tmp_path / "tokenizer")
    write_chats(tmp_path / "bad.jsonl", [("ask", "reply")] if line else [])
    with (tmp_path / "bad.jsonl").open("a") as file:
        file.write(line)
    before = everything(tmp_path)
    words = ["--tokenizer", tmp_path / "tokenizer", "--max-length", 64]
    code, complaint = tide("prepare", tmp_path / "out", tmp_path / "bad.jsonl", *words)
    assert code == 2
    assert re.match(rf"error: \S*{said}", complaint), complaint
    assert everything(tmp_path) == before
