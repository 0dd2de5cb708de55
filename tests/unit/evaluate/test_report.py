"""A report: its table, its files, and that what cannot be compared is not."""

import json
import math
import re

import pytest
from PIL import Image
from rich.console import Console

from tide_megatron.base.errors import DataError
from tide_megatron.evaluate.plots import plot_training, read_metrics, smooth
from tide_megatron.evaluate.report import (
    PromptReplies,
    Report,
    comparison_table,
    differences_to,
    paired_difference,
    source_table,
    t_quantile,
)

TIMES = (0.1, 0.5, 0.9)


def score(nll, accuracy=0.25, *, context="block_diffusion", wobble=0.0, **more):
    return {
        "context": context,
        "samples": 4,
        "nll_per_byte": nll,
        "masked_accuracy": accuracy,
        "by_time": [
            {"time": time, "nll_per_byte": nll * time, "nll_per_token": 1.0, "masked_accuracy": accuracy}
            for time in TIMES
        ],
        "sample_nll_per_byte": [nll - wobble, nll + wobble, nll - wobble, nll + wobble],
        **more,
    }


SCORES = {
    "undistilled": score(1.9, cpu_seconds=40.4),
    "distilled": score(1.8, 0.3, wobble=0.02, cpu_seconds=80),
}
TEACHERS = {"teacher": score(1.4, 0.4)}


@pytest.fixture
def run_folders(tmp_path):
    folders = {}
    for name, values in {"undistilled": (3.0, 2.0), "distilled": (3.0, 1.5)}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        lines = [
            {"kind": "train", "step": 1, "loss": 9.0, "loss/ce": values[0]},
            {"kind": "train", "step": 2, "loss": None, "loss/ce": None},
            {"kind": "train", "step": 10, "loss": 9.0, "loss/ce": values[1]},
            {"kind": "evaluate", "step": 10, "nll_per_byte": 1.5},
        ]
        (folders[name] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folders


def test_the_table_says_scores_differences_and_costs():
    table = comparison_table(SCORES, "undistilled", teachers=TEACHERS)
    assert table.title == "Held-out scores (block_diffusion bound)"
    assert table.columns == ("run", "nats/byte", "accuracy", "difference, 95 %", "CPU s")
    assert table.rows == (
        ("undistilled", "1.9000", "25.0%", "reference", "40"),
        # the differences are -0.1 +- 0.02: standard deviation 0.0231, times 3.1824 / 2
        ("distilled", "1.8000", "30.0%", "-0.1000 ± 0.0367", "80"),
        ("teacher", "1.4000", "40.0%", "", ""),
    )


def test_calibration_and_sources_are_shown_where_they_are_known(tmp_path):
    parts = [{"source": "a", "samples": 3, "nll_per_byte": 1.5, "masked_accuracy": 0.2}]
    more = [*parts, {"source": "b", "samples": 1, "nll_per_byte": 3.0, "masked_accuracy": 0.1}]
    scores = {
        "undistilled": score(
            1.9, tempered_nll_per_byte=1.85, expected_calibration_error=0.034, by_source=more
        ),
        "older": score(1.8, by_source=parts),
    }
    table = comparison_table(scores, "undistilled")
    assert table.columns == ("run", "nats/byte", "accuracy", "tempered", "ECE", "difference, 95 %")
    assert table.rows[0] == ("undistilled", "1.9000", "25.0%", "1.8500", "3.4%", "reference")
    assert table.rows[1][3:5] == ("", "")
    assert source_table({"only": scores["older"], "none": score(1.0)}) is None, "one source is no comparison"
    found = source_table(scores)
    assert found.columns == ("run", "a (3)", "b (1)")
    assert found.rows == (("undistilled", "1.5000", "3.0000"), ("older", "1.5000", ""))
    text = Report(title="t", scores=scores, reference="undistilled").write(tmp_path).read_text()
    assert "expected calibration error" in text
    assert found.markdown() in text


def test_runs_that_scored_other_samples_are_not_subtracted():
    scores = {"one": score(1.0, sample_ids=[4, 2, 9, 1]), "other": score(1.0, sample_ids=[4, 2, 9, 3])}
    with pytest.raises(DataError, match="other and one were scored on different samples"):
        differences_to(scores, "one")
    assert set(differences_to({"one": scores["one"], "old": score(1.0)}, "one")) == {"old"}


def test_bounds_of_different_kinds_are_labelled_and_not_subtracted():
    scores = {**SCORES, "other": score(1.7, context="bidirectional")}
    assert set(differences_to(scores, "undistilled")) == {"distilled"}
    table = comparison_table(scores, "undistilled")
    assert "not comparable across kinds" in table.title
    assert table.columns[2] == "bound"
    assert [row[2] for row in table.rows] == ["block_diffusion", "block_diffusion", "bidirectional"]
    assert table.rows[2][4] == ""


def test_the_table_fits_a_terminal_and_markdown():
    table = comparison_table({"a|b": score(1.0)}, "a|b")
    assert table.markdown().splitlines() == [
        "| run | nats/byte | accuracy | difference, 95 % |",
        "| --- | ---: | ---: | ---: |",
        "| a\\|b | 1.0000 | 25.0% | reference |",
    ]
    console = Console(record=True, width=80)
    console.print(comparison_table(SCORES, "undistilled").rich())
    assert re.search(r"distilled +1\.8000 +30\.0% +-0\.1000 ± 0\.0367 +80", console.export_text())


def test_a_report_is_whole(tmp_path, run_folders):
    sample = PromptReplies(prompt="Say ```x```.", replies={"distilled": "def x(): ..."})
    report = Report(
        title="Study",
        scores=SCORES,
        reference="undistilled",
        teachers=TEACHERS,
        run_folders=run_folders,
        samples=[sample],
        lead=["What they can do."],
        notes=["A distilled step costs 1.8 others."],
    )
    text = report.write(tmp_path / "report").read_text()
    images = re.findall(r"\]\((.*?\.png)\)", text)
    assert images == ["differences.png", "noise_levels.png", "training.png"]
    for image in images:
        with Image.open(tmp_path / "report" / image) as picture:
            assert picture.width > 500
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20  # something is drawn
    assert text.startswith("# Study\n\nWhat they can do.\n\n## Held-out scores")
    assert "A distilled step costs 1.8 others." in text
    assert "paired over 4 samples" in text
    assert "````text\nSay ```x```.\n````" in text


def test_a_report_of_bare_figures_has_no_plots(tmp_path):
    bare = {
        "a": {"nll_per_byte": 1.0, "masked_accuracy": 0.5},
        "b": {"nll_per_byte": 2.0, "masked_accuracy": 0.25},
    }
    text = Report(title="Bare", scores=bare, reference="a").write(tmp_path).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert "(unknown bound)" in text
    assert "| b | 2.0000 | 25.0% |  |" in text


def test_a_common_term_is_drawn_rather_than_objectives(tmp_path, run_folders, monkeypatch):
    labels = []
    monkeypatch.setattr("tide_megatron.evaluate.plots._label", lambda axis, x, y: labels.append(y))
    records = {name: read_metrics(folder) for name, folder in run_folders.items()}
    plot_training(records, tmp_path / "one.png")
    assert labels == ["training loss, ce", "held-out NLL, nats per byte"]
    labels.clear()
    records["plain"] = [{"kind": "train", "step": 1, "loss": 1.0}]
    plot_training({"plain": records["plain"]}, tmp_path / "two.png")
    plot_training(records, tmp_path / "three.png")
    assert labels == ["objective", "objective", "held-out NLL, nats per byte"]


def test_smoothing_does_not_lag():
    line = [float(value) for value in range(50)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([0.0, 3.0, 0.0], reach=1) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("scores", "reference", "words"),
    [
        (
            SCORES,
            "undistiled",
            r"reference run 'undistiled' is not among the scores; did you mean 'undistilled'\?",
        ),
        ({"a": {"masked_accuracy": 1.0}}, "a", r"scores of 'a' lack 'nll_per_byte'"),
        ({"a": score(1.0), "b": {**score(1.0), "sample_nll_per_byte": [1.0]}}, "a", r"1 against 4"),
    ],
)
def test_scores_that_cannot_be_compared(scores, reference, words):
    with pytest.raises(DataError, match=words):
        comparison_table(scores, reference)


def test_metrics_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl: not readable .* is .* a run folder\?"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2: not a metrics record"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # 97.5 % points of Student's T from printed tables
    [
        (1, 12.7062),
        (2, 4.30265),
        (4, 2.77645),
        (10, 2.22814),
        (30, 2.04227),
        (255, 1.96931),
        (100_000, 1.95999),
    ],
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, rel=2e-5)


def test_the_interval_is_students():
    # differences 1, 2, 3: mean 2, standard deviation 1
    difference = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)
    assert difference.mean == 2.0
    assert difference.ci95 == pytest.approx((2 - half, 2 + half), rel=1e-4)
    assert difference.pairs == 3
    assert not difference.is_clear


def test_what_makes_samples_hard_drops_out():
    hard = [1.0, 10.0, 100.0, 1000.0]
    difference = paired_difference([value - 0.5 for value in hard], hard)
    assert difference.mean == -0.5
    assert difference.ci95 == (-0.5, -0.5)
    assert difference.is_clear


def test_one_pair_has_no_interval():
    difference = paired_difference([1.0], [0.0])
    assert difference.mean == 1.0
    assert all(map(math.isnan, difference.ci95))
    assert not difference.is_clear


@pytest.mark.parametrize(("one", "other"), [([], []), ([1.0], [1.0, 2.0])])
def test_pairs_must_be_pairs(one, other):
    with pytest.raises(DataError, match=r"paired values: \d against \d; score both runs on the same"):
        paired_difference(one, other)
