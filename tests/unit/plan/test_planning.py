"""`tide plan` on small models: what fits, what does not and why, from config.json files alone."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from tests.tiny_run import student_config, teacher_config
from tide_megatron.base.errors import ConfigError, TideError
from tide_megatron.commands import app
from tide_megatron.plan.planning import Machine, Sent, leaving, link_of, plan, read_numbers

CONTEXT = {"kind": "block_diffusion", "block_size": 8}
ROOMY = Machine(per_node=2, memory=100_000_000, reserve=0)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    for name, config in (("student", student_config(320)), ("teacher", teacher_config(320, 4))):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tree = {
        "folder": str(folder / "run"),
        "steps": 1,
        "student": {"folder": str(folder / "student"), "context": CONTEXT},
        "teachers": {"moe": {"folder": str(folder / "teacher"), "context": CONTEXT}},
        "data": {"train": str(folder / "nowhere"), "fixed_length": 32},
        "batch": {"samples": 8},
        "losses": {"ce": {"kind": "cross_entropy"}, "kl": {"kind": "kl", "teacher": "moe"}},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def answer(run_file):
    (found,) = plan(run_file, [], [4], ROOMY, records=2)
    return found


def test_the_best_layout_fits_and_says_what_it_holds_and_sends(answer):
    best = answer.best
    phase, peak = best.record.peak
    assert best.headroom == 100_000_000 - peak.num_bytes > 0
    assert sum(best.by_owner().values()) == peak.num_bytes
    assert phase in best.record.peaks
    assert best.sent()["network"] > 0, "gradients are summed over two nodes"
    assert answer.looked_at > 10
    assert peak.num_bytes >= best.candidate.least_bytes


def test_a_formula_never_says_more_than_a_step_holds(answer):
    for option in answer.options:
        held = sum(option.record.held.values())
        assert option.candidate.least_bytes <= held


def test_the_same_answer_twice_as_json(run_file):
    words = [
        "plan",
        str(run_file),
        "--gpus",
        "2",
        "--memory",
        "1GB",
        "--reserve",
        "1MB",
        "--json",
        "--records",
        "1",
    ]
    first, second = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    options = json.loads(first.stdout)["options"]
    assert [(option["gpus"], option["fits"]) for option in options] == [(2, True)]


def test_a_person_sees_layouts_and_one_rank(run_file):
    words = ["plan", str(run_file), "--gpus", "4", "--memory", "1GB", "--reserve", "1MB"]
    shown = CliRunner().invoke(app, [*words, "--records", "1", "--explain", "3"])
    assert shown.exit_code == 0, shown.output
    for word in ("batch.microbatch=2", "rank 3 of 4", "masters and moments", "reduce_scatter"):
        assert word in shown.stdout


@pytest.mark.parametrize(
    ("words", "gpus", "machine", "told"),
    [
        ([], [3], ROOMY, "batch.samples: 8 samples per update cannot be shared by 3 ranks; use 9"),
        (["data.fixed_length=null"], [2], ROOMY, "say with --length how long samples are"),
        (["data.fixed_length=100000"], [2], ROOMY, "tokens are more than the"),
        (["teachers.moe.folder=nowhere"], [2], ROOMY, "config.json"),
    ],
)
def test_what_cannot_be_is_one_sentence(run_file, words, gpus, machine, told):
    with pytest.raises(TideError) as fault:
        plan(run_file, words, gpus, machine)
    assert told in str(fault.value)


def test_where_nothing_fits_it_says_what_binds(run_file):
    with pytest.raises(ConfigError) as fault:
        plan(run_file, [], [2], Machine(memory=200_000, reserve=0))
    assert "no layout fits 2 GPUs of 200 kB usable memory" in str(fault.value)
    # Three fp32 numbers for each of 32,064 parameters, over two ranks.
    assert "most of it masters and moments (192 kB)" in str(fault.value)


def test_links_and_bytes_that_leave():
    assert link_of((0, 7), 8) == "node"
    assert link_of((0, 8), 8) == "network"
    ranks = (0, 1, 2, 3)
    for kind, expected in (
        ("allreduce", 150),
        ("allgather_base", 300),
        ("reduce_scatter_base", 75),
        ("alltoall_base", 75),
        ("send", 100),
        ("recv", 0),
    ):
        assert leaving(Sent("head", "head", kind, ranks), 100) == expected


def test_numbers_of_gpus():
    assert read_numbers("8, 16") == [8, 16]
    for text in ("", "8,x", "0", "8,,16"):
        with pytest.raises(ConfigError, match="--gpus"):
            read_numbers(text)
