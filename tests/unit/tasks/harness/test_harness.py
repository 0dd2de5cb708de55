"""lm-evaluation-harness really runs on our models: its own tasks on local files, by text and by choice."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tide_megatron.platform.distributed import stop_distributed

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from tests.harness_tasks import write_tasks
from tests.small_task import Repeat, evaluated, write_student
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.decode.decoder import Decoder
from tide_megatron.tasks import TASKS
from tide_megatron.tasks.answers import read_answers
from tide_megatron.tasks.folder import scores_of
from tide_megatron.tasks.harness import loading

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_own_and_harness_tasks_in_one_call_and_again(student, local, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "repeat", Repeat)
    words, how = ["repeat", "local_words:letter", "local_choices"], {"include": local, "draws": 6}
    found = evaluated(student, words, out=tmp_path, limit=3, **how)["tasks"]
    assert list(found) == ["repeat", "local_words", "local_choices"]
    assert (found["local_words"]["filter"], found["local_words"]["metric"]) == ("letter", "exact_match")
    assert found["local_choices"]["likelihood"]["variance"] > 0
    assert [one["questions"] for one in found.values()] == [3, 3, 3]
    few = scores_of(tmp_path)["local_choices"]
    monkeypatch.setattr(
        Decoder, "decode", lambda self, prompts, options, **more: [] if not prompts else 1 / 0
    )
    again = evaluated(student, words, out=tmp_path, limit=3, **how)["tasks"]
    assert {name: one["score"] for name, one in again.items()} == {
        name: one["score"] for name, one in found.items()
    }
    monkeypatch.undo()
    monkeypatch.setitem(TASKS, "repeat", Repeat)
    every = evaluated(student, ["local_choices"], out=tmp_path, **how)["tasks"]
    assert every["local_choices"]["questions"] == 7
    assert scores_of(tmp_path)["local_choices"].items() >= few.items()


def test_the_harness_judges_what_the_decoder_wrote(student, local, tmp_path):
    evaluated(student, ["local_words"], include=local, out=tmp_path, decoding=["new_tokens=5"])
    answers = read_answers(tmp_path / "local_words")
    assert len(answers) == 7
    assert {answer["room"] for answer in answers.values()} == {5}  # the task's own are 4
    with pytest.raises(ConfigError, match=r"decoding\.new_tokens is 5 there, 'nothing' here"):
        evaluated(student, ["local_words"], include=local, out=tmp_path)


def test_the_registered_class_is_what_simple_evaluate_finds(student, local):
    import tide_megatron.tasks.harness.language_model  # noqa: F401 - it registers `tide`

    try:
        found = lm_eval.simple_evaluate(
            model="tide",
            model_args=f"pretrained={student},device=cpu,draws=4,new_tokens=3",
            tasks=["local_words"],
            task_manager=TaskManager(include_path=str(local), include_defaults=False),
            apply_chat_template=True,
            batch_size=3,
            limit=4,
            bootstrap_iters=0,
        )
    finally:
        stop_distributed()
    assert found["n-samples"]["local_words"] == {"original": 7, "effective": 4}
    [prompt, _] = found["samples"]["local_words"][0]["arguments"][0]
    assert prompt == "<|im_start|>user\nsay word 0<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (
            ["local_words:strict"],
            ConfigError,
            "local_words has no filter 'strict'; choose one of: first, letter",
        ),
        (["local_words:lettr"], ConfigError, "did you mean 'letter'"),
        (
            ["hellaswag_letter"],
            DataError,
            "data set 'Rowan/hellaswag' of the Hugging Face hub where there is a",
        ),
    ],
)
def test_what_cannot_be_had_is_one_sentence(student, local, tmp_path, words, kind, said):
    with pytest.raises(kind, match=said) as fault:
        evaluated(student, words, include=local, out=tmp_path / "out")
    assert len(str(fault.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_gets_the_nearest_name(monkeypatch, local):
    plain = loading.TaskManager
    monkeypatch.setattr(
        loading, "TaskManager", lambda **options: plain(include_path=str(local), include_defaults=False)
    )
    with pytest.raises(ConfigError, match=r"'local_word' is no task .* did you mean 'local_words'"):
        loading.load_harness_tasks(_entries("local_word"), None, ())


def test_code_runs_in_this_process_only_by_name(monkeypatch, local):
    text = (local / "local_words.yaml").read_text().replace("task: local_words", "task: local_code")
    (local / "local_code.yaml").write_text(text + "unsafe_code: true\n")
    with pytest.raises(ConfigError, match="without the sandbox; allow that by --unsandboxed local_code"):
        loading.load_harness_tasks(_entries("local_code"), local, ())
    [task] = loading.load_harness_tasks(_entries("local_code"), local, ("local_code",))
    assert list(task.leaves) == ["local_code"]


def test_perplexity_is_refused(student, local, tmp_path):
    text = (local / "local_choices.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("doc_to_choice", "metric_list"))]
    text = (
        "\n".join(lines)
        .replace("local_choices", "local_text")
        .replace("multiple_choice", "loglikelihood_rolling")
    )
    (local / "local_text.yaml").write_text(
        text.replace("doc_to_target: label", 'doc_to_target: "{{word}}"')
        + "\nmetric_list: [{metric: word_perplexity}]\n"
    )
    with pytest.raises(ConfigError, match="a diffusion model has no perplexity of running text"):
        evaluated(student, ["local_text"], include=local, out=tmp_path)


def _entries(name):
    from tide_megatron.tasks.suite import chosen_entries

    return chosen_entries([name]).entries


@pytest.mark.slow  # the harness reads its whole index of tasks
@pytest.mark.timeout(600)
def test_the_harnesss_own_command_runs_on_two_ranks(student, local, tmp_path):
    words = ["--model", "tide", "--model_args", f"pretrained={student},draws=4"]
    words += ["--tasks", "local_words,local_choices", "--include_path", str(local), "--apply_chat_template"]
    words += ["--output_path", str(tmp_path), "--log_samples", "--batch_size", "4", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "tide_megatron.tasks.harness", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["n-samples"]["local_choices"]["effective"] == 7
    assert set(found["results"]) == {"local_words", "local_choices"}
