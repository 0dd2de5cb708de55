"""A job's script: what bash makes of values that were meant to break it, what comes back into the queue, and
what is frozen beside it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny_run import write_tiny_run
from tide_megatron.base.errors import ConfigError
from tide_megatron.launch.job import JobOptions, directive, log_pattern, mounts, quoted
from tide_megatron.launch.job_script import Submission, render
from tide_megatron.launch.submit import submit
from tide_megatron.train.resolve import digest, load_recipe

NASTY = [
    "two  words",
    "it's",
    'say "hi"',
    "$(touch canary)",
    "`touch canary`",
    "a; touch canary",
    "a && touch canary | b > canary",
    "ünï 日本 🌊",
    "-rf",
    "*?[a-z]{1..3}",
    "!!",
    "~root $HOME ${x?}",
    "a #b",
    "100% %j",
    "\\",
]


def job(tmp_path, options=None, **given):
    known = {
        "name": "run",
        "gpus_per_node": 0,
        "cpus_per_rank": 1,
        "python": "python3",
        "directory": tmp_path,
    }
    return Submission(
        **{"options": options or JobOptions(nodes=2, ranks_per_node=4), "folder": tmp_path / "j"}
        | known
        | given
    )


@pytest.mark.parametrize("value", NASTY)
def test_bash_reads_every_value_as_it_was_meant(tmp_path, machine, value):
    folder = tmp_path / f"x{value}"
    folder.mkdir()
    options = JobOptions(nodes=2, ranks_per_node=4, env=[f"SAID={value}"], container=f"{value}.sif")
    given = job(tmp_path, options, directory=folder, folder=folder / "jobs", python=value)
    if value == "\\":
        with pytest.raises(ConfigError, match=r"^folder: .* holds a backslash, .*; rename it$"):
            render(given)
        given = job(tmp_path, options, directory=folder, python=value)
    done, calls = machine(render(given))
    assert (done.returncode, done.stderr) == (0, "")
    [[where, said, *words]] = calls["srun"]
    assert where == str(folder)
    assert said == value
    assert words == [
        *("--kill-on-bad-exit=0", "--wait=60", "--ntasks-per-node=1", "--cpus-per-task=4"),
        *("apptainer", "exec", "--bind", ",".join(mounts([str(given.folder), str(folder)]))),
        *("--pwd", str(folder), f"{value}.sif", "env", f"PYTHONPATH={given.folder}/code", value),
        *("-m", "tide_megatron.commands", "train", f"{given.folder}/recipe.yaml", "--ranks-per-node", "4"),
    ]
    assert [path for path in tmp_path.rglob("canary*")] == []


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "\x1b[31m", "a\x00b", "\u2028", "\ud800", "", "  "])
def test_what_no_script_can_hold_is_refused_by_its_option(value):
    with pytest.raises(ConfigError, match=r"^--name: '.*' (holds a line break|is empty)"):
        JobOptions(name=value)
    if value.strip():
        with pytest.raises(ConfigError, match=r"^--env SAID: .* holds a line break"):
            JobOptions(env=[f"SAID={value}"])
        with pytest.raises(ConfigError, match=r"^--sbatch --comment: .* holds a line break"):
            JobOptions(sbatch=[f"--comment={value}"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nodes": 0}, "--nodes: 0 is too small; use 1 or more"),
        ({"ranks_per_node": -1}, "--ranks-per-node: -1 is too small"),
        ({"time": "4h"}, "--time: '4h' is no time of SLURM's; write 90"),
        ({"time": "3"}, "--warning: 180 s before a limit of --time 3 is before the job begins"),
        ({"time": "0:30", "warning": 30}, "--warning: 30 s before a limit"),
        ({"env": ["X"]}, "--env: 'X' is no NAME=VALUE"),
        ({"env": ["a b=c"]}, "--env: 'a b=c' is no NAME=VALUE"),
        ({"env": ["WANDB_API_KEY=0123456789"]}, "--env: WANDB_API_KEY sounds like a secret"),
        ({"env": ["hf_token=0123456789"]}, "--env: hf_token sounds like a secret"),
        ({"sbatch": ["-p x"]}, "--sbatch: '-p x' is no long option"),
        ({"sbatch": ["--nodes=3"]}, "--sbatch: --nodes is written already; use --nodes"),
        ({"sbatch": ["--job-name=x"]}, "--sbatch: --job-name is written already; use --name"),
        ({"chain": 2, "sweep": Path("x")}, "--chain: an array cannot be chained"),
    ],
)
def test_options_that_cannot_be(given, said):
    with pytest.raises(ConfigError) as caught:
        JobOptions(**given)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:01", 14_401),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("0-0:30:10", 1810),
    ],
)
def test_times_of_slurms_are_taken(tmp_path, time, seconds):
    options = JobOptions(time=time, warning=seconds - 1)
    assert f'#SBATCH --time="{time}"\n' in render(job(tmp_path, options))
    with pytest.raises(ConfigError, match="is before the job begins"):
        JobOptions(time=time, warning=seconds)


def test_lines_for_sbatch():
    assert directive("nodes", 2) == "#SBATCH --nodes=2"
    assert directive("requeue") == "#SBATCH --requeue"
    assert directive("comment", 'a "b" \\ $c') == '#SBATCH --comment="a \\"b\\" \\\\ $c"'
    assert log_pattern(Path("/a b/50%j"), "%j.log") == "/a b/50%%j/%j.log"


def test_one_task_a_rank_and_gpus(tmp_path):
    options = JobOptions(
        nodes=16, ranks_per_node=8, shape="rank", account="me", sbatch=["--qos=high", "--exclusive"]
    )
    script = render(job(tmp_path, options, gpus_per_node=8, cpus_per_rank=12))
    for line in (
        "#SBATCH --nodes=16",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --gpus-per-node=8",
        '#SBATCH --signal="B:USR1@180"',
        '#SBATCH --account="me"',
        '#SBATCH --qos="high"',
        "#SBATCH --exclusive",
    ):
        assert f"{line}\n" in script
    assert "--ntasks-per-node=8 --cpus-per-task=12" in script
    assert "--ranks-per-node" not in script.replace("--ntasks-per-node", "")
    assert "--preflight-only" not in script
    assert "--preflight-only &\n" in render(job(tmp_path, JobOptions(preflight_only=True)))


def test_pyxis_sees_every_folder_once(tmp_path):
    options = JobOptions(container="nvcr.io#nvidia/pytorch:25.01-py3", mount=["/data/x"])
    given = job(Path("/home/me"), options, seen=("/data", "/models/a", "runs/x"))
    at_home = f"{Path('runs/x').absolute()}"
    seen = ",".join(f"{each}:{each}" for each in sorted(["/data", "/home/me", "/models/a", at_home]))
    image = "--container-image=nvcr.io#nvidia/pytorch:25.01-py3"
    wanted = f"'{image}' --container-mounts={seen} --container-workdir=/home/me"
    assert wanted in render(given)
    with pytest.raises(ConfigError, match=r"^/a,b: a container's mounts cannot hold ',' or ':'"):
        mounts(["/a,b"])


@pytest.mark.parametrize(
    ("code", "state", "variables", "requeued", "said"),
    [
        ("75", "RUNNING", {}, True, "job 71234 puts itself back into the queue"),
        ("75", "RUNNING", {"SLURM_RESTART_COUNT": "2"}, True, "puts itself back"),
        (
            "75",
            "RUNNING",
            {"SLURM_RESTART_COUNT": "3"},
            False,
            "job 71234 has used up its 3 restarts",
        ),
        ("75", "CANCELLED", {}, False, "job 71234 is CANCELLED, so it does not put itself back"),
        ("75", "COMPLETING", {}, False, "job 71234 is COMPLETING, so it does not"),
        ("75", "", {}, False, "job 71234 is unknown to squeue, so it does not"),
        ("0", "RUNNING", {}, False, ""),
        ("2", "RUNNING", {}, False, ""),
        ("1", "RUNNING", {}, False, ""),
    ],
)
def test_only_a_running_job_that_stopped_in_order_goes_back(
    tmp_path, machine, code, state, variables, requeued, said
):
    script = render(job(tmp_path, JobOptions(restarts=3)))
    done, calls = machine(script, CODE=code, STATE=state, **variables)
    assert (done.returncode, done.stderr) == (int(code), "")
    assert said in done.stdout
    assert [call[2:] for call in calls.get("scontrol", [])] == [["requeue", "71234"]] * requeued


@pytest.mark.parametrize("options", [JobOptions(restarts=0), JobOptions(chain=3)])
def test_a_job_that_shall_not_come_back_does_not(tmp_path, machine, options):
    script = render(job(tmp_path, options))
    done, calls = machine(script, CODE="75", STATE="RUNNING")
    assert done.returncode == 75
    assert "scontrol" not in calls
    assert "#SBATCH --no-requeue\n" in script
    assert ('#SBATCH --dependency="singleton"\n' in script) == (options.chain > 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


def handed_over(file, words=(), monkeypatch=None, programs=None, **options):
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return submit(file, list(words), JobOptions(nodes=2, ranks_per_node=2, **options), check=False)


def test_what_is_frozen_is_the_run(tmp_path, tiny, machine, monkeypatch):
    words = [f"folder={tmp_path / 'run'}", "steps=7"]
    first = handed_over(tiny, words, monkeypatch, machine.programs)
    second = handed_over(tiny, words, monkeypatch, machine.programs)
    assert [each.job.folder.name for each in (first, second)] == ["001", "002"]
    folder = first.job.folder
    assert folder == tmp_path / "run/jobs/001"
    assert digest(load_recipe(folder / "recipe.yaml")[1]) == digest(load_recipe(tiny, words)[1])
    frozen = folder / "code/tide_megatron"
    there = {str(path.relative_to(frozen)) for path in frozen.rglob("*") if path.is_file()}
    package = Path(__file__).parents[3] / "tide_megatron"
    assert there == {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert (folder / "job.sbatch").read_text() == first.script
    assert "commit" in (folder / "code/VERSION").read_text()


def test_a_rehearsal_writes_nothing(tmp_path, tiny):
    done = submit(tiny, [f"folder={tmp_path / 'run'}"], JobOptions(), check=False, dry_run=True)
    assert done.numbers == ()
    assert done.script.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_would_be_refused_at_its_start_is_not_submitted(tmp_path, tiny):
    words = [f"folder={tmp_path / 'run'}", "teachers.moe.layout.expert=3"]
    with pytest.raises(ConfigError, match=r"teachers\.moe\.layout"):
        submit(tiny, words, JobOptions(nodes=2, ranks_per_node=2), dry_run=True)


def test_without_sbatch_it_says_so(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        submit(tiny, [f"folder={tmp_path / 'run'}"], JobOptions(), check=False)
    assert list(tmp_path.iterdir()) == []


def test_a_secret_is_written_nowhere(tmp_path, tiny, machine, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee-very-secret")
    where = tmp_path / "run"
    for words, what in (
        ((f"folder={where}", "metrics.project=c0ffee-very-secret"), "recipe.yaml"),
        ((f"folder={where}-c0ffee-very-secret",), "recipe.yaml"),
    ):
        with pytest.raises(ConfigError, match=rf"^{what}: would hold the value of WANDB_API_KEY") as caught:
            handed_over(tiny, words, monkeypatch, machine.programs)
        assert "c0ffee" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^job\.sbatch: would hold the value of WANDB_API_KEY"):
        handed_over(tiny, [f"folder={where}"], monkeypatch, machine.programs, env=["X=c0ffee-very-secret"])
    handed_over(tiny, [f"folder={where}"], monkeypatch, machine.programs)
    texts = [path.read_text() for path in where.rglob("*") if path.is_file()]
    assert not any("c0ffee-very-secret" in text for text in texts)


def test_a_sweep_has_a_recipe_and_a_folder_a_line(tmp_path, tiny, machine, monkeypatch):
    file = tmp_path / "sweep"
    file.write_text("optimizer.learning_rate=0.1  # high\n\nseed=5 'metrics.project=two words'\n")
    words = [f"folder={tmp_path / 'run'}"]
    done = handed_over(tiny, words, monkeypatch, machine.programs, sweep=file)
    trees = [yaml.safe_load((done.job.folder / f"recipes/{n}.yaml").read_text()) for n in (0, 1)]
    assert [tree["optimizer"]["learning_rate"] for tree in trees] == [0.1, 0.01]
    assert [tree["folder"] for tree in trees] == [f"{tmp_path}/run/sweep-{n:03d}" for n in (0, 1)]
    assert trees[1]["metrics"]["project"] == "two words"
    assert "#SBATCH --array=" in done.script
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1", "CODE": "75", "STATE": "RUNNING"}
    _, calls = machine(done.script, **array)
    assert f"{done.job.folder}/recipes/1.yaml" in calls["srun"][0]
    assert "--jobs=70_1" in calls["squeue"][-1], "the number alone means the whole array"
    assert calls["scontrol"][0][2:] == ["requeue", "70_1"]
    file.write_text("folder=a\nfolder=a\n")
    with pytest.raises(ConfigError, match="two runs the folder a"):
        handed_over(tiny, words, monkeypatch, machine.programs, sweep=file)


def test_the_verb_makes_nothing_that_everybody_may_write(tmp_path, tiny, machine):
    code = "import os, sys; os.umask(0); from tide_megatron.commands import main; main()"
    words = [
        "submit",
        str(tiny),
        "--no-check",
        "--nodes",
        "2",
        "--partition",
        "a b",
        f"folder={tmp_path}/run",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PATH": f"{machine.programs}:{os.environ['PATH']}"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "watch it:  tide status" in done.stdout
    made = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert (tmp_path / "run/jobs/001/job.sbatch") in made
    assert [path for path in made if path.stat().st_mode & stat.S_IWOTH] == []
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o775, "the rest of the umask is the user's"


PREPARE = Path(__file__).parents[3] / "examples/slurm/prepare.sbatch"
EXAMPLES = sorted(file for file in PREPARE.parent.glob("*.sbatch") if file != PREPARE)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
@pytest.mark.parametrize(("code", "state"), [("0", "RUNNING"), ("75", "RUNNING"), ("75", "CANCELLED")])
def test_scripts_by_hand_start_what_they_are_given_and_go_back_as_ours_do(
    tmp_path, machine, file, code, state
):
    words = ["configs/runs/paper_pair.yaml", "metrics.project=two words", "$(touch canary)"]
    given = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "CODE": code, "STATE": state}
    script = f"cd {tmp_path}; set -- {quoted(*words)}; {file.read_text()}"
    done, calls = machine(script, **given)
    is_torchrun = file.stem == "torchrun"
    if is_torchrun:  # the stand-in of scontrol names no node
        assert (done.returncode, done.stderr) == (2, "no node in SLURM_JOB_NODELIST=n[1-2]\n")
        return
    assert (done.returncode, done.stderr) == (int(code), "")
    [[_, _, *told]] = calls["srun"]
    start = told.index(".venv/bin/tide")
    per_node = [] if file.stem == "sixteen_nodes" else ["--ranks-per-node", "8"]
    assert told[start:] == [".venv/bin/tide", "train", *words, *per_node]
    assert ("scontrol" in calls) == (code == "75" and state == "RUNNING")
    lines = file.read_text().splitlines()
    assert "NEVER RAN" in file.read_text()
    tasks = next(line for line in lines if "--ntasks-per-node" in line).rpartition("=")[2]
    assert f"--ntasks-per-node={tasks}" in told


STAND_IN = """#!/bin/bash
printf '%s\\n' "$@" > told
if [ -n "${WAITS:-}" ]; then trap 'exit 75' TERM; kill -TERM $PPID; while :; do sleep 0.05; done; fi
exit "$CODE"
"""


@pytest.mark.parametrize(
    ("code", "state", "waits"),
    [
        ("0", "RUNNING", ""),
        ("75", "RUNNING", ""),
        ("75", "RUNNING", "1"),
        ("75", "CANCELLED", ""),
        ("2", "RUNNING", ""),
    ],
)
def test_an_array_prepares_its_part_and_goes_back(tmp_path, machine, code, state, waits):
    words = ["data/x", "two words.jsonl", "$(touch canary)"]
    tide = tmp_path / ".venv/bin/tide"
    tide.parent.mkdir(parents=True)
    tide.write_text(STAND_IN)
    tide.chmod(0o755)
    script = f"cd {tmp_path}; set -- {quoted(*words)}; {PREPARE.read_text()}"
    done, calls = machine(script, CODE=code, STATE=state, WAITS=waits, SLURM_CPUS_PER_TASK="3")
    assert (done.returncode, done.stderr) == (int(code), "")
    told = (tmp_path / "told").read_text().splitlines()
    assert told == ["prepare", *words, "--part", "slurm", "--workers", "3"]
    assert ("scontrol" in calls) == (code == "75" and state == "RUNNING")
    assert "NEVER RAN" in PREPARE.read_text()


def test_there_are_scripts_for_1_2_and_16_nodes():
    nodes = [line for file in EXAMPLES for line in file.read_text().splitlines() if "SBATCH --nodes" in line]
    assert {line.rpartition("=")[2] for line in nodes} == {"1", "2", "16"}
