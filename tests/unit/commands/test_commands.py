"""The command line: a frozen surface, instant help, errors in one message, words passed on."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.small_tokenizer import write_chats, write_tokenizer
from tide_megatron import __version__, commands
from tide_megatron.base.errors import ConfigError, DataError, RanksFailed, TideError
from tide_megatron.commands import VERBS, app, main
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.order import Cell
from tide_megatron.decode.reply import Reply
from tide_megatron.export.checks import Check
from tide_megatron.export.export import ExportOptions
from tide_megatron.launch import doctor as launch_doctor
from tide_megatron.launch import ranks as launch_ranks
from tide_megatron.launch.doctor import Finding
from tide_megatron.tasks.sampling import Sampled

SURFACE = {
    "prepare": "out sources --config --tokenizer --max-length --on-long --on-bad --shape --dedup --portion "
    "--normalize --learn --teacher --add-mask --replace --workers --part",
    "train": "recipe overrides --ranks --ranks-per-node --device --folder --branch --resume/--fresh "
    "--dry-run --preflight-only",
    "submit": "recipe overrides --nodes --ranks-per-node --shape --partition --account --time --name "
    "--gpus-per-node --cpus-per-rank --container --containers --mount --warning --restarts --chain --sweep "
    "--env --sbatch --python --preflight-only/--no-preflight-only --check/--no-check --dry-run",
    "status": "runs --json --watch",
    "plan": "recipe overrides --gpus --gpus-per-node --memory --reserve --length --records --explain --json",
    "recipe": "key --markdown",
    "sample": "model prompts --new-tokens --steps --schedule --threshold --temperature --top-p --guidance "
    "--stop --seed --batch --cache/--no-cache --system --mask --input --out --replay --show-order --context "
    "--block-size --ranks --device --precision --engine --fp8",
    "chat": "model --new-tokens --steps --schedule --threshold --temperature --top-p --guidance --stop "
    "--seed --batch --cache/--no-cache --system --mask --show-order --context --block-size --device "
    "--precision --engine --fp8",
    "evaluate": "model --data --tasks --out --against --limit --decoding --think --draws --include "
    "--unsandboxed --samples --times --context --block-size --ranks --device --precision --engine --fp8 "
    "--json",
    "report": "runs --out --png/--no-png",
    "export": "model out --format/--flavour --shard-size --dtype --force --verify/--no-verify",
    "doctor": "--device",
    "convert hf-to-megatron": "source target --ranks --dtype --layers --force",
    "convert megatron-to-hf": "source target --config --ranks --dtype --shard-size --shard-gb --force",
    "checkpoint inspect": "path --tensors --json",
    "checkpoint verify": "path --record",
    "checkpoint diff": "first second --json",
    "data inspect": "data --sample --html --tokenizer --teacher --json",
    "data merge": "out folders --replace",
    "data split": "data first second --share --samples --held-out --source --seed --replace",
    "model add-mask": "folder target --token --noise --seed",
}
"""What users type. Changing it is a decision: change it here too, and say so in the changelog."""


def spoken(parameter):
    words = "/".join([*parameter.opts, *parameter.secondary_opts])
    return words if words.startswith("-") else parameter.name


def surface(group, prefix=""):
    """Return what each verb takes, verbs of verbs under both words."""
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= surface(command, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = " ".join(spoken(parameter) for parameter in command.params)
    return found


def test_the_surface_is_frozen():
    assert surface(typer.main.get_command(app)) == SURFACE
    assert list(VERBS) == [name for name in SURFACE if " " not in name]


@pytest.mark.parametrize("verb", SURFACE)
def test_every_verb_explains_itself_with_an_example(verb):
    result = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert result.exit_code == 0
    assert f"Example: {'tide ' + verb}" in " ".join(result.output.split())


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['tide', 'train', '--help']\n"
        "from tide_megatron.commands import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'megatron', 'transformers', 'omegaconf') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"tide-megatron {__version__}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dcotor"], "No such command 'dcotor'"),
        (["doctor", "--devcie", "cpu"], "No such option: --devcie"),
        (["doctor", "--device", "tpu"], "'tpu' is not one of"),
        (["train"], "Missing argument"),
        (["train", "x.yaml", "--ranks", "0"], "--ranks"),
    ],
)
def test_words_that_are_not_known(words, said):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    "words",
    [
        "train ~/x.yaml",
        "train ~/x.yaml --dry-run",
        "submit ~/x.yaml --dry-run",
        "sample ~/x hello",
        "chat ~/x",
        "evaluate ~/x --data ~/y",
        "export ~/x ~/out",
        "convert hf-to-megatron ~/x ~/out",
        "convert megatron-to-hf ~/x ~/out",
        "prepare ~/out ~/x.jsonl --tokenizer ~/x --max-length 8",
        "checkpoint inspect ~/x",
        "checkpoint verify ~/x",
        "checkpoint diff ~/x ~/y",
    ],
)
def test_no_verb_takes_the_home_for_a_folder_of_that_name(monkeypatch, tmp_path, words):
    """A shell leaves `~` alone behind `=` and in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words.split())
    assert isinstance(result.exception, TideError), result.exception
    assert f"{tmp_path}/me/x" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["", "~nobody-here/x"])
def test_a_run_folder_that_cannot_be_is_not_ignored(tmp_path, folder):
    (tmp_path / "run.yaml").write_text("folder: runs/x\n")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--folder", folder])
    assert isinstance(result.exception, ConfigError)
    assert f"folder: {folder!r} is not valid" in str(result.exception)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("steps: 0 is too few; use 1"), 2, "error: steps: 0 is too few; use 1\n"),
        (RanksFailed("rank 1 of 2 failed first: boom"), 1, "error: rank 1 of 2 failed first: boom\n"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(monkeypatch, capsys, error, code, said):
    def fail(**_):
        raise error

    monkeypatch.setattr(commands, "app", fail)
    monkeypatch.setattr(commands, "start_log", lambda: None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == code
    assert capsys.readouterr() == ("", said)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "app", fail)
    monkeypatch.setattr(commands, "start_log", lambda: None)
    with pytest.raises(ZeroDivisionError):
        main()


def test_an_aborted_run_is_exit_code_130(monkeypatch):
    def interrupt(wanted):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch_doctor, "examine", interrupt)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 130


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("note", 0), ("fault", 1)])
def test_doctor_shows_findings_and_fails_on_faults(monkeypatch, verdict, code):
    asked = []

    def examine(wanted):
        asked.append(wanted)
        yield Finding(topic="torch", value="2.6")
        yield Finding(topic="2 ranks", value="hung [here]", verdict=verdict)

    monkeypatch.setattr(launch_doctor, "examine", examine)
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == code
    assert asked == ["cpu"]
    assert "torch" in result.output
    assert "hung [here]" in result.output
    assert verdict in result.output


STOPPED = """
import os, signal, sys, time
from tide_megatron import commands
def verb():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
commands.app.command("stand")(verb)
sys.argv = ["tide", "stand"]
commands.main()
"""


@pytest.mark.parametrize(("variables", "code"), [({}, 75), ({"TORCHELASTIC_RUN_ID": "none"}, 0)])
def test_a_verb_that_is_asked_to_stop_says_so_and_has_an_exit_code_of_its_own(variables, code):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    environment |= {"COLUMNS": "200", **variables}
    done = subprocess.run(
        [sys.executable, "-c", STOPPED],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == code
    assert "SIGTERM heard: ending here, nothing has to be saved; a second one ends at once" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_passes_the_recipes_timeout_on(monkeypatch, tmp_path):
    calls, is_finished = [], [True, False, False]

    def run_ranks(
        function, args, num_ranks, device, *, ranks_per_node, timeout_seconds, hang_seconds, deadlines
    ):
        seconds = (timeout_seconds, hang_seconds, deadlines.data)
        calls.append((function.__name__, args[2], num_ranks or ranks_per_node, device, seconds))
        return {"finished": is_finished.pop(0)}

    monkeypatch.setattr(launch_ranks, "run_ranks", run_ranks)
    context = {"kind": "block_diffusion", "block_size": 8}
    tree = {
        "folder": "runs/x",
        "student": {"folder": "models/x", "context": context},
        "data": {"train": "data/x"},
        "losses": {"ce": {"kind": "cross_entropy"}},
        "steps": 1,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    words = ["train", str(tmp_path / "run.yaml"), "--device", "cpu"]
    for more, code in (
        (["--ranks", "2"], 0),
        (["--ranks-per-node", "2", "timeout_seconds=90", "deadlines.data=9"], 75),
    ):
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == code, result.output
    assert calls == [
        ("train", True, 2, "cpu", seconds) for seconds in ((600.0, 300.0, None), (90.0, 45.0, 9.0))
    ]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert CliRunner().invoke(app, words).exit_code == 0, "torchrun fails on any other code"


def test_sample_passes_prompts_on_and_prints_replies(monkeypatch, tmp_path):
    calls = []

    def run_ranks(function, args, num_ranks, device, **more):
        calls.append((function.__name__, args, num_ranks, device))
        reply = Reply(ids=(1, 2), text="a [b] c", order=(1, 0), ended="eos", forwards=2)
        shown = [Cell(text="a [b]", steps=(1,)), Cell(text=" c", steps=(0,))]
        return [Sampled(conversation=one, reply=reply, cells=shown) for one in args[1].conversations]

    monkeypatch.setattr(launch_ranks, "run_ranks", run_ranks)
    words = ["sample", "models/x", "one", "two", "--new-tokens", "12", "--device", "cpu", "--ranks", "2"]
    words += ["--context", "block_diffusion", "--block-size", "8"]
    more = ["--schedule", "entropy", "--threshold", "0.2", "--stop", "END", "--stop", "---", "--no-cache"]
    result = CliRunner().invoke(app, [*words, *more, "--system", "Be kind."])
    assert result.exit_code == 0, result.output
    assert result.output == "one\na [b] c\n\ntwo\na [b] c\n\n"
    ((name, (place, work, context, mask, numbers), num_ranks, device),) = calls
    assert (name, str(place), num_ranks, device) == ("sample_conversations", "models/x", 2, "cpu")
    told = [[message["content"] for message in one.messages] for one in work.conversations]
    assert told == [["Be kind.", "one"], ["Be kind.", "two"]]
    assert (context.kind, context.block_size) == ("block_diffusion", 8)
    assert work.options == Decoding(
        new_tokens=12, schedule="entropy", threshold=0.2, stop=("END", "---"), cache=False
    )
    assert (work.out, mask) == (None, None)
    assert (numbers.precision, numbers.engine, numbers.fp8) == ("auto", "auto", None)
    short = ["sample", "models/x", *words[-4:]]
    CliRunner().invoke(app, short, input="three\n\nfour\n")
    assert [one.messages[-1]["content"] for one in calls[1][1][1].conversations] == ["three", "four"]
    file, page = tmp_path / "prompts.jsonl", tmp_path / "page.html"
    file.write_text('{"prompt": "five"}\n')
    result = CliRunner().invoke(app, [*short, "--input", str(file), "--replay", str(page), "--show-order"])
    assert "five\na [b] c\ncommitted first" in result.output
    assert "a [b]" in page.read_text()
    for wrong in (["six", "--input", str(file)], ["six", "--top-p", "2"], []):
        result = CliRunner().invoke(app, [*short, *wrong], input="")
        assert isinstance(result.exception, ConfigError), wrong
    assert "there are none" in str(result.exception)


def test_prompts_that_are_no_text_are_refused_before_a_model_is_read():
    words = ["sample", "models/x", "--context", "bidirectional"]
    for more, input_ in ((["fine", "a \udce4"], None), ([], b"a \xe4\n")):
        result = CliRunner().invoke(app, [*words, *more], input=input_)
        assert isinstance(result.exception, DataError)
        assert "no UTF-8 text" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "forms"), [([], ("a2d-qwen3", "sdar", "qwen3")), (["--format", "sdar"], ("sdar",))]
)
def test_export_passes_choices_on_and_shows_what_was_verified(monkeypatch, words, forms):
    calls = []

    def run_ranks(function, args, num_ranks):
        calls.append((function.__name__, args, num_ranks))
        return [Check(form="sdar", what="servers", found="mask [3]", is_fine=False)]

    monkeypatch.setattr(launch_ranks, "run_ranks", run_ranks)
    words = ["export", "runs/x", "out", *words, "--shard-size", "2MB", "--dtype", "bf16", "--force"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "note  mask [3]" in result.output
    wanted = ExportOptions(formats=forms, shard_bytes=2_000_000, dtype="bf16", force=True)
    assert calls == [("export_student", (Path("runs/x"), Path("out"), wanted), 1)]
    quiet = CliRunner().invoke(app, [*words, "--no-verify"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert not calls[1][1][2].verify


def test_a_terminal_that_knows_ascii_only_is_written_to(tmp_path, monkeypatch):
    folder = write_tokenizer(tmp_path / "tökenizer")
    chats = write_chats(tmp_path / "chats.jsonl", [("a", "b")])
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    words = [str(tmp_path / "dätä"), str(chats), "--tokenizer", str(folder), "--max-length", "64"]
    monkeypatch.setattr(sys, "argv", ["tide", "prepare", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    shown.flush()
    assert rb"d\xe4t\xe4: 1" in shown.buffer.getvalue().replace(b"\n", b"")


def test_prepare_leaves_out_bad_records_when_told(tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", [("a", "b"), ("a", "<|mask|>")])
    words = ["prepare", str(tmp_path / "out"), str(chats), "--max-length", "64"]
    words += ["--tokenizer", f"{write_tokenizer(tmp_path / 'small')},template=qwen3"]
    refused = CliRunner().invoke(app, words)
    assert "1 of 2 records are bad: 1 text with the mask token; --on-bad skip" in str(refused.exception)
    done = CliRunner().invoke(app, [*words, "--on-bad", "skip", "--normalize"])
    assert "1 samples" in done.output.replace("\n", "")
    assert "1 left out" in done.output.replace("\n", " ")


def test_a_dry_run_is_no_preflight():
    fault = CliRunner().invoke(app, ["train", "run.yaml", "--dry-run", "--preflight-only"]).exception
    assert isinstance(fault, ConfigError)
    assert str(fault).startswith("--dry-run starts no ranks and --preflight-only")
