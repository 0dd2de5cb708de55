"""One run's life in one process: scored from its start, profiled, ended, branched, moved, prolonged."""

import gzip
import json
import logging
import shutil

import pytest
from typer.testing import CliRunner

from tests.tiny_run import write_tiny_run
from tide_megatron import api
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.base.log import ROOT
from tide_megatron.commands import app
from tide_megatron.train import loop

WORDS = [
    "evaluation.at_start=true",
    "evaluation.every=1",
    "evaluation.calibration=true",
    "checkpoints.keep=1",
    "checkpoints.keep_best=nll_per_byte",
    "metrics.profile=[2,2]",
    "steps=2",
]


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """Give the folder of a run that has ended, and its result."""
    folder, log = tmp_path_factory.mktemp("life"), logging.getLogger(ROOT)
    level = log.level
    log.setLevel(logging.INFO)  # as the command line does
    yield folder, api.train(write_tiny_run(folder), WORDS)
    log.setLevel(level)


def records(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_it_is_scored_before_its_first_update_with_every_level_and_the_time(life):
    folder, result = life
    first, *rest = records(folder)
    assert (first["kind"], first["step"]) == ("evaluate", 0)
    assert [line["step"] for line in rest if line["kind"] == "evaluate"] == [1, 2]
    levels = {row["time"]: row["nll_per_byte"] for row in result["by_time"]}
    assert {level: rest[-1][f"nll_per_byte/{level}"] for level in (0.3, 0.7)} == levels
    assert 0 < result["expected_calibration_error"] < 1
    assert 0 < abs(result["tempered_nll_per_byte"] - result["nll_per_byte"]) < 0.5 * result["nll_per_byte"]
    assert [part["samples"] for part in result["by_source"]] == [result["samples"]]
    times = [line["time"] for line in records(folder)]
    assert times == sorted(times)
    assert all(time.endswith("+00:00") for time in times)


def test_its_log_and_its_profile_are_in_its_folder(life):
    folder, _ = life
    log = (folder / "run/run.log").read_text()
    for words in ("device: ", "step 0: held out", "step 2/2", "the student is in"):
        assert words in log
    (trace,) = (folder / "run").glob("profile*")
    assert trace.name == "profile-steps-2-2.json.gz"
    with gzip.open(trace) as stream:
        events = json.load(stream)["traceEvents"]
    assert any("aten::" in str(event.get("name")) for event in events)


def test_its_best_checkpoint_is_named_and_the_programs_way_to_look_at_it_is_whole(life):
    folder, result = life
    best = (folder / "run/checkpoints/best").read_text().strip()
    assert best == "step-00000002-000000000016"
    shown = CliRunner().invoke(app, ["checkpoint", "inspect", str(folder / "run"), "--json", "--tensors"])
    values = json.loads(shown.stdout)
    assert values["clock"]["step"] == 2
    assert values["spent"]["starts"] == result["total_starts"] == 1
    name = max(values["tensors"], key=len)
    plain = CliRunner().invoke(app, ["checkpoint", "inspect", str(folder / "run"), "--tensors"])
    assert name in plain.stdout
    assert str(folder / "run/checkpoints" / best) in plain.stdout
    same = CliRunner().invoke(app, ["checkpoint", "diff", str(folder / "run"), str(folder / "run"), "--json"])
    assert json.loads(same.stdout) == {"metadata": [], "tensors": []}


def test_another_start_says_that_it_has_finished_and_scores_nothing(life, monkeypatch):
    folder, _ = life

    def refuse(*_, **__):
        raise AssertionError("nothing is left to score")

    monkeypatch.setattr(loop, "evaluate", refuse)
    before = (folder / "run/result.json").read_bytes()
    assert api.train(folder / "run.yaml", WORDS) == json.loads(before)
    assert (folder / "run/result.json").read_bytes() == before
    assert "already finished at step 2" not in (folder / "run/run.log").read_text()


def test_tide_evaluate_finds_the_scores_of_the_run(life):
    folder, result = life
    scores = api.evaluate(folder / "run", folder / "data/held_out", samples=8, times=[0.3, 0.7], device="cpu")
    assert scores["nll_per_byte"] == pytest.approx(result["nll_per_byte"], rel=1e-6)
    assert scores["masked_accuracy"] == result["masked_accuracy"]


@pytest.mark.parametrize(
    ("how", "said", "moves"),
    [
        ({"precision": "bf16"}, "bf16, local engine", (1e-6, 2e-2)),
        ({"fp8": "rowwise"}, "fp32 and FP8 rowwise, emulated engine", (1e-6, 5e-2)),
        ({"fp8": "rowwise", "engine": "scaled"}, "fp32 and FP8 rowwise, scaled engine", (1e-6, 5e-2)),
    ],
)
def test_a_model_is_scored_in_the_numbers_that_are_asked_for(life, caplog, how, said, moves):
    folder, result = life
    caplog.set_level("INFO")
    scores = api.evaluate(
        folder / "run", folder / "data/held_out", samples=8, times=[0.3, 0.7], device="cpu", **how
    )
    least, most = moves
    assert least < abs(scores["nll_per_byte"] / result["nll_per_byte"] - 1) < most
    assert said in caplog.text


def test_numbers_that_are_not_to_be_had_are_refused_with_their_option(life):
    folder, _ = life
    for how, words in (
        ({"engine": "te"}, "engine: 'te' cannot run"),
        ({"engine": "scaled"}, "engine: 'scaled' computes frozen teachers in FP8 alone"),
        ({"engine": "local", "fp8": "rowwise"}, "engine: 'local' has no FP8 layers"),
        ({"fp8": "delayed"}, "--fp8: .*delayed scales"),
        ({"precision": "fp16"}, "--precision: 'fp16' is not valid"),
    ):
        with pytest.raises(ConfigError, match=words):
            api.evaluate(folder / "run", folder / "data/held_out", samples=8, device="cpu", **how)


def test_another_run_branches_from_it_with_and_without_moments(life):
    folder, result = life
    own = ["optimizer.learning_rate=1e-9", "steps=1", f"branch.folder={folder}/run"]
    for name, words in (("with", []), ("without", ["branch.optimizer=false"])):
        branch = [f"folder={folder}/{name}", *own, *words]
        found = api.train(folder / "run.yaml", branch)
        assert found["clock"]["step"] == 1
        assert found["branch"].startswith("step 2 of recipe ")
        assert found["nll_per_byte"] == pytest.approx(result["nll_per_byte"], rel=1e-5)
        shown = CliRunner().invoke(app, ["checkpoint", "inspect", str(folder / name), "--json"])
        assert json.loads(shown.stdout)["optimizer_steps"] == [3 if name == "with" else 1]
    with pytest.raises(CheckpointError, match=r"another recipe:\n  branch"):
        api.train(folder / "run.yaml", [f"folder={folder}/with", *own[:2]])


def test_moved_it_goes_on_for_more_steps_and_adds_up_what_it_cost(life, tmp_path):
    """The last test: it moves what the others use."""
    folder, result = life
    for name in ("student", "teacher", "data"):
        shutil.move(folder / name, tmp_path / name)
    moved = [f"student.folder={tmp_path}/student", f"teachers.moe.folder={tmp_path}/teacher"]
    moved += [f"data.train={tmp_path}/data/train", f"data.held_out={tmp_path}/data/held_out"]
    longer = api.train(folder / "run.yaml", [*WORDS, *moved, "steps=3"])
    assert (longer["clock"]["step"], longer["total_starts"]) == (3, 2)
    assert longer["total_seconds"] > result["seconds"] * 0.5 + longer["seconds"]
    assert [line["step"] for line in records(folder) if line["kind"] == "evaluate"] == [0, 1, 2, 3]
    shutil.copytree(tmp_path / "student", tmp_path / "other")
    (tmp_path / "other/config.json").write_text(
        (tmp_path / "student/config.json").read_text().replace("10000.0", "20000.0")
    )
    with pytest.raises(CheckpointError, match=r"student\.folder was .*, and .*other holds another model"):
        api.train(folder / "run.yaml", [*WORDS, *moved, f"student.folder={tmp_path}/other", "steps=4"])
