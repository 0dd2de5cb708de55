"""The page: whole, from its own file alone, with nothing of a user's taken for HTML."""

import dataclasses
import html.parser
import json
import re
import time

import pytest

from tests.unit.report.runs import STEPS, read, scores, train_record, write_run
from tide_megatron.base.errors import ConfigError, TideError
from tide_megatron.evaluate.report import paired_difference
from tide_megatron.head.options import HeadOptions
from tide_megatron.report import facts
from tide_megatron.report.comparison import differences, recipes
from tide_megatron.report.layout_picture import MOST_CARDS, layout_picture
from tide_megatron.report.report import write_report
from tide_megatron.report.surface import surfaces
from tide_megatron.report.tasks import tasks

VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """Reads a page: its text, its headings, and that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href", "srcset") or str(value).startswith("#")
        assert tag not in ("script", "link", "iframe", "img", "object")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def page_of(folders, out, **options):
    text = write_report(folders, out, **options).read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    return Page(text)


def test_the_page_has_every_part_and_each_figure_is_a_png(tmp_path, models):
    folder = write_run(tmp_path / "run", models)
    page = page_of([folder], tmp_path / "out")
    assert page.headings == [
        "Held-out scores",
        "Losses",
        "Agreement with teachers",
        "Lambda",
        "Gradients of the terms",
        "Chunk likelihoods",
        "Speed and memory",
        "Layout",
        "Starts",
        "Recipe",
    ]
    assert "run: finished, update 40 of 40" in page.text
    assert "term kl (weight 2)" in page.text
    assert "40.0% of 100 chunks are pushed up by Reverse CALM" in page.text
    assert "The whole run is done" in page.text
    pngs = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert {"loss", "loss-ce", "nll_per_byte", "kl-moe-levels", "lambda-mix", "gradient_cosine"} <= pngs
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in (tmp_path / "out").glob("*.png"))


def test_nothing_of_a_user_is_html_or_a_formula(tmp_path, models):
    name = '<script>alert(1)<\\script> & "x" $\\frac$ --> _'
    folder = write_run(
        tmp_path / name, models, teacher="<i>t", terms=("$\\bad$", "<b>kl</b>", "--><svg onload=x>"), reached=2
    )
    (folder / "starts.jsonl").unlink()
    page = page_of([folder], tmp_path / "out", pngs=False)
    assert name in page.text
    assert "term <b>kl</b>" in page.text
    assert "--><svg onload=x>" in page.text


def test_a_run_that_recorded_little_says_how_to_record_more(tmp_path, models):
    folder = write_run(tmp_path / "run", models, reached=1, agreement=False, result=False)
    records = (folder / "metrics.jsonl").read_text().splitlines()
    plain = {name: value for name, value in json.loads(records[0]).items() if "gradient" not in name}
    (folder / "metrics.jsonl").write_text(json.dumps(plain) + "\n")
    page = page_of([folder], tmp_path / "out", pngs=False)
    for words in (
        "set evaluation.agreement=64",
        "set metrics.gradients_every=50",
        "No held-out scores yet",
        "2% of the run is done",
        "it ended without a word",
    ):
        assert words in page.text


def test_several_runs_are_compared_in_pairs_with_intervals(tmp_path, models):
    folders = [write_run(tmp_path / "plain", models), write_run(tmp_path / "taught", models, shift=-0.1)]
    page = page_of(folders, tmp_path / "out", pngs=False)
    wanted = paired_difference(scores(-0.1)["sample_nll_per_byte"], scores(0)["sample_nll_per_byte"])
    half = (wanted.ci95[1] - wanted.ci95[0]) / 2
    assert f"{wanted.mean:+.4f} ± {half:.4f}" in page.text
    assert "so 12 samples are pairs" in page.text
    assert page.headings[0] == "Compared with plain"
    assert page.headings[-2:] == ["In what the recipes differ", "Recipes"]
    assert "The recipes are the same but for their folders." in page.text
    assert {"Layout of plain", "Layout of taught"} <= set(page.headings)


def test_runs_on_other_samples_are_not_compared(tmp_path, models):
    folders = [write_run(tmp_path / "plain", models), write_run(tmp_path / "taught", models, shift=-0.1)]
    result = scores(0) | {"sample_ids": list(range(1, 13))}
    (folders[1] / "result.json").write_text(json.dumps(result))
    text = (folders[1] / "recipe.yaml").read_text().replace("seed: 3", "seed: 4")
    (folders[1] / "recipe.yaml").write_text(text)
    runs = [read(folder) for folder in folders]
    scored = differences(runs, {"plain": 0, "taught": 1})
    assert "were scored on different samples" in scored.missing
    assert scored.panels == ()
    assert '<td class="long">seed</td><td class="long">3 -&gt; 4</td>' in recipes(runs).body


def test_a_hundred_thousand_records_are_thinned_and_said_so(tmp_path, models):
    folder = write_run(tmp_path / "run", models, agreement=False)
    record = train_record(1, 0.0, ("ce", "kl", "mix"))
    keys = ("kind", "consumed", "loss", "loss/ce", "seconds", "phase/teacher")
    plain = {key: record[key] for key in keys}
    lines = (json.dumps(plain | {"step": step, "loss": 1.0 + step % 7}) for step in range(1, 30_001))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    began = time.process_time()
    page = page_of([folder], tmp_path / "out", pngs=False)
    assert time.process_time() - began < 10
    assert "mean of 75 records or more" in page.text
    assert (tmp_path / "out/report.html").stat().st_size < 400_000


def test_phases_are_weighed_by_the_time_of_their_records(tmp_path, models):
    run = read(write_run(tmp_path / "run", models))
    text = facts.phases([run])
    assert f"{(20 * 0.5 + 60 * 0.25) / 80:.1%}" in text
    assert f"{3 * 0.5 / 80:.1%}" in text  # one record has it


def test_the_layout_has_a_card_a_rank_with_what_it_holds(tmp_path, models):
    run = read(write_run(tmp_path / "run", models, ranks=4))
    layout = dataclasses.replace(run.recipe.teachers["moe"].layout, expert=2)
    moe = dataclasses.replace(run.recipe.teachers["moe"], layout=layout)
    recipe = dataclasses.replace(run.recipe, teachers={"moe": moe}, head=HeadOptions(ranks=2))
    picture, missing = layout_picture(dataclasses.replace(run, recipe=recipe))
    assert missing == ""
    assert re.findall(r"<h3>rank (\d)</h3>", picture) == ["0", "1"]
    assert re.findall(r"experts \d-\d", picture) == ["experts 0-1", "experts 2-3"]
    assert "ids 0 to 159" in picture
    assert "Ranks 2 to 3 are not drawn" in picture
    assert MOST_CARDS >= 8


@pytest.mark.parametrize("fault", ["recipe", "starts", "models", "ranks"])
def test_a_layout_that_cannot_be_drawn_is_a_sentence(tmp_path, models, fault):
    folder = write_run(tmp_path / "run", models, ranks=3 if fault == "ranks" else 2)
    if fault == "starts":
        (folder / "starts.jsonl").unlink()
    run = read(folder)
    if fault == "recipe":
        run = dataclasses.replace(run, recipe=None)
    if fault == "models":
        gone = dataclasses.replace(run.recipe.student, folder=str(tmp_path / "gone"))
        run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, student=gone))
    if fault == "ranks":
        layout = dataclasses.replace(run.recipe.teachers["moe"].layout, expert=2)
        moe = dataclasses.replace(run.recipe.teachers["moe"], layout=layout)
        run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, teachers={"moe": moe}))
    picture, missing = layout_picture(run)
    assert picture == ""
    assert missing.startswith("The layout is not shown: ")


def test_the_surface_of_lambda_knows_how_far_the_run_came(tmp_path, models):
    (panel,) = surfaces(read(write_run(tmp_path / "run", models, reached=STEPS // 4)), "")
    assert panel.title == "lambda of mix (both, cosine)"
    assert panel.note.startswith("25% of the run is done")


def test_no_run_too_many_and_a_folder_that_cannot_be_written_are_refused(tmp_path, models):
    with pytest.raises(ConfigError, match="0 runs"):
        write_report([], tmp_path)
    with pytest.raises(ConfigError, match="13 runs: name 1 to 12"):
        write_report([tmp_path] * 13, tmp_path)
    folder = write_run(tmp_path / "run", models, reached=0, agreement=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(TideError, match="file"):
        write_report([folder], tmp_path / "file", pngs=False)


def test_scores_of_tasks_are_shown_with_intervals_and_compared_by_question(tmp_path, models):
    folders = [write_run(tmp_path / name, models, reached=2, agreement=False) for name in ("plain", "taught")]
    for number, folder in enumerate(folders):
        of_task = folder / "evaluation/count"
        of_task.mkdir(parents=True)
        scores_of = {f"q{question}": float(question % (4 - number) == 0) for question in range(40)}
        share = sum(scores_of.values()) / 40
        result = {"score": share, "interval": [share - 0.1, share + 0.1], "questions": 40}
        (of_task / "scores.json").write_text(json.dumps(scores_of))
        (folder / "evaluation/result.json").write_text(json.dumps({"tasks": {"count": result, "odd": 3}}))
        line = {"kind": "tasks", "step": 2, "consumed": 16, "tasks/count": share}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    section = tasks([read(folder) for folder in folders], {"plain": 0, "taught": 1})
    assert "25.0 [15.0, 35.0] of 40" in section.body
    assert "35.0 [25.0, 45.0] of 40" in section.body
    pair = paired_difference(
        [float(question % 3 == 0) for question in range(40)],
        [float(question % 4 == 0) for question in range(40)],
    )
    assert f"+10.0 [{100 * pair.ci95[0]:+.1f}, {100 * pair.ci95[1]:+.1f}]" in section.body
    assert "not clear" in section.body
    assert [panel.title for panel in section.panels] == ["count in training"]
    assert tasks([read(write_run(tmp_path / "none", models, reached=1))], {"none": 0}).html() == ""
