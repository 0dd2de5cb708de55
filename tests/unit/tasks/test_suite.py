"""Words of --tasks, suite files, and the paper's protocol against its table 6."""

from pathlib import Path

import pytest

from tide_megatron.base.errors import ConfigError
from tide_megatron.decode.options import Decoding
from tide_megatron.tasks import TASKS
from tide_megatron.tasks.suite import FOLDER, chosen_entries, published_of, read_suite

ROOT = Path(__file__).parents[3]
TABLE_6 = {  # new tokens, steps, shots, batch
    "MMLU": (3, 3, 0, 128),
    "HellaSwag": (3, 3, 0, 128),
    "MMLU-Pro": (256, 256, 0, 64),
    "GSM8K": (256, 256, 0, 128),
    "HumanEval": (256, 256, None, 128),
    "BBH": (256, 256, 3, 32),
    "MATH": (256, 256, 0, 32),
    "MBPP": (256, 256, 0, 32),
}
AVERAGES = {"undistilled": 32.67, "KL": 30.55, "TIDE-Shared": 33.55, "TIDE-Cross": 34.20}
"""Of table 1."""


def test_the_papers_protocol_and_scores():
    suite = chosen_entries(["paper"])
    found = {}
    for entry in suite.entries:
        decoding = entry.decoded(Decoding(), {})
        assert (decoding.guidance, decoding.temperature) == (0.0, 0.0)
        found[entry.name] = (decoding.new_tokens, decoding.steps, entry.shots, decoding.batch)
    assert found == TABLE_6
    assert suite.block_size == 32
    for model, average in AVERAGES.items():
        scores = [entry.published.scores[model] for entry in suite.entries]
        assert sum(scores) / 8 == pytest.approx(average, abs=0.006)


def test_the_file_in_configs_is_the_one_that_runs():
    assert (ROOT / "configs/evaluation/paper.yaml").samefile(FOLDER / "paper.yaml")


def test_words(monkeypatch):
    monkeypatch.setitem(TASKS, "ours", object)
    found = chosen_entries(["ours", "gsm8k_cot:strict-match", "lm_eval/ours2"]).entries
    assert [(entry.name, entry.task, entry.filter) for entry in found] == [
        ("ours", "ours", None),
        ("gsm8k_cot", "lm_eval/gsm8k_cot", "strict-match"),
        ("ours2", "lm_eval/ours2", None),
    ]
    assert published_of("lm_eval/gsm8k_cot").scores["TIDE-Cross"] == 52.24
    assert published_of("humaneval") == published_of("humaneval_instruct")
    assert published_of("ours") is None
    with pytest.raises(ConfigError, match="--tasks: name some"):
        chosen_entries([])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: {}", "task: a suite has `tasks`"),
        ("tasks: {x: {task: humaneval, filtr: a}}", r"tasks\.x\.filtr: unknown key; did you mean 'filter'"),
        ("tasks: {x: {shots: 1}}", r"tasks\.x\.task: is required; set it in the file"),
        ("tasks: {x: {task: a, published: {KL: 3.0}}}", r"published\.questions: None is not valid"),
    ],
)
def test_a_suite_file_that_cannot_be(tmp_path, text, said):
    file = tmp_path / "suite.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_suite(file)


def test_options_of_the_command_go_before_the_suites():
    entry = chosen_entries(["paper"]).entries[0]
    assert entry.decoded(Decoding(), {"steps": 32}).steps == 32
