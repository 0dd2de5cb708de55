"""What a run's folder says of it while it goes, and after whatever ended it; and the page."""

import dataclasses
import html.parser
import itertools
import json
import os
import time

import pytest

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.lease import LEASE, leased
from tide_megatron.base.phases import PHASES
from tide_megatron.base.units import in_time
from tide_megatron.train import status as status_module
from tide_megatron.train.folder import CHECKPOINTS, PAGE, STATUS
from tide_megatron.train.history import note_end, note_start
from tide_megatron.train.sinks import JsonLines, Record
from tide_megatron.train.status import MOST_POINTS, Curve, StatusPage, read_status
from tide_megatron.train.status_page import MOST_RANKS, chosen_ranks, render

CLOCK = Clock(total_steps=100)
SECONDS = [[0.5] * len(PHASES), [0.25] * len(PHASES)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 100\n")
    return tmp_path


def clock_at(step):
    return dataclasses.replace(CLOCK, step=step, consumed=step * 8)


def train_record(step, loss):
    values = {"loss": loss, "phase/teacher": 0.5, "tokens_per_second": 1234.5}
    return Record(kind="train", clock=clock_at(step), values=values, rank_seconds=SECONDS)


def fill(folder, steps=range(5, 30, 5), hosts=("n1", "n<2>")):
    """Let a run tell of itself; return its sink, open."""
    lines = JsonLines(folder, CLOCK)
    page = StatusPage(folder, CLOCK, hosts)
    for step in steps:
        for sink in (lines, page):
            sink.write(train_record(step, 10.0 - step / 10))
    page.write(Record(kind="evaluate", clock=clock_at(steps[-1]), values={"nll_per_byte": 2.5}))
    lines.close()
    return page


def test_a_folder_that_is_no_runs_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no run's folder \(recipe.yaml is missing\)"):
        read_status(tmp_path)


def test_the_page_that_a_run_leaves_says_how_it_ended_though_it_still_holds_its_folder(folder):
    note_start(folder, CLOCK, None, 2)
    page = fill(folder)
    with leased(folder / LEASE, "the run folder", CheckpointError):
        page.close()
        assert ">training<" in (folder / PAGE).read_text(encoding="utf-8")
        note_end(folder, "finished", "", 25)
        status_module.write_status(folder)
        text = (folder / PAGE).read_text(encoding="utf-8")
    assert ">finished<" in text
    assert "it starts" not in text


def test_what_became_of_a_run_is_seen_from_its_folder(folder):
    assert read_status(folder).state == "not started"
    with leased(folder / LEASE, "folder"):
        assert read_status(folder).why == "it starts: models and data are being read"
        note_start(folder, CLOCK, None, 2)
        found = read_status(folder)
        assert (found.state, found.why) == ("training", "")
        assert f"pid {os.getpid()}" in found.holder
    assert read_status(folder).state == "lost"
    note_end(folder, "failed", "rank 1: no memory")
    found = read_status(folder)
    assert (found.state, found.why, found.holder) == ("failed", "rank 1: no memory", "")


def test_a_lease_that_nobody_touches_is_no_life(folder):
    note_start(folder, CLOCK, None, 2)
    (folder / LEASE).write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1}))
    assert read_status(folder).state == "training"
    past = time.time() - 90
    os.utime(folder / LEASE, (past, past))
    assert read_status(folder).state == "lost"


def test_what_it_said_last_is_read_back(folder):
    fill(folder).close()
    (folder / CHECKPOINTS / "step-00000020-000000000160").mkdir(parents=True)
    found = read_status(folder)
    told = found.told
    assert (told.step, told.steps, told.train["loss"], told.scores) == (
        25,
        100,
        7.5,
        {"step": 25, "nll_per_byte": 2.5},
    )
    assert told.curves["loss"] == [[step, 10.0 - step / 10] for step in range(5, 30, 5)]
    assert told.rank_seconds == SECONDS
    assert told.hosts == ["n1", "n<2>"]
    assert 0 < told.eta_seconds < 60
    assert found.checkpoint == "step-00000020-000000000160"
    assert found.silent_seconds < 60
    json.dumps(found.values())


def test_a_resumed_run_goes_on_with_its_curves(folder):
    fill(folder).close()
    page = StatusPage(folder, clock_at(25))
    page.write(train_record(30, 1.0))
    page.close()
    told = read_status(folder).told
    assert told.curves["loss"][-2:] == [[25, 7.5], [30, 1.0]]
    assert len(told.curves["loss"]) == 6


def test_it_is_not_written_at_every_record(folder, monkeypatch):
    written = []
    monkeypatch.setattr(status_module, "write_status", lambda folder, told: written.append(told.step))
    page = fill(folder)
    assert written == [5]
    page.close()
    assert written == [5, 25]


def test_a_long_curve_is_thinned_and_keeps_its_ends_shape():
    curve = Curve()
    for step in range(10_000):
        curve.add(step, float(step))
    steps = [step for step, _ in curve.points]
    assert MOST_POINTS / 2 <= len(steps) <= MOST_POINTS
    assert steps[0] == 0
    assert steps[-1] > 9_900
    assert {later - before for before, later in itertools.pairwise(steps)} == {curve.stride}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"at": 3}', '{"at": "x", "step": 1}'])
def test_a_file_of_another_release_is_nothing_told(folder, text):
    (folder / STATUS).write_text(text)
    assert read_status(folder).told is None


class Tags(html.parser.HTMLParser):
    """Collects what is open, and the words."""

    def __init__(self):
        super().__init__()
        self.open, self.words = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "line", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """A tag that closes itself opens nothing."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_runs_nobodys_code(folder):
    note_start(folder, CLOCK, 4, 2)
    note_end(folder, "failed", "<script>alert(1)</script> & more")
    fill(folder).close()
    text = (folder / PAGE).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    said = " ".join(tags.words)
    for words in (
        "step 25 of 100",
        "failed",
        "n<2>",
        "<script>alert(1)</script> & more",
        "held out: nll_per_byte",
    ):
        assert words in said
    assert text.count("<script>") == 1
    assert text.count("<svg") == 1, "one score is no curve"
    assert "refresh" not in text, "nothing more will come"
    with leased(folder / LEASE, "folder"):
        assert 'http-equiv="refresh"' in render(read_status(folder).values())


def test_of_many_ranks_those_that_stand_out_are_shown():
    seconds = [[1.0, 2.0] for _ in range(500)]
    seconds[321][1] = 3.0
    seconds[7][0] = 0.2
    shown = chosen_ranks(seconds)
    assert {7, 321} <= set(shown)
    assert len(shown) == MOST_RANKS
    assert chosen_ranks(seconds[:4]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "?"), (3.2, "3 s"), (119, "119 s"), (600, "10 min"), (86400 + 7260, "1 day, 2:01 h")],
)
def test_durations(seconds, words):
    assert in_time(seconds) == words
