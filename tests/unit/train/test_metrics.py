"""Records: what is averaged and when, what a resumed file holds, sinks that fail, and phase times."""

import dataclasses
import json
import logging
import math
import signal
import time
from pathlib import Path

import pytest
import rich
from pydantic import ValidationError
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import TideError
from tide_megatron.base.phases import Phases
from tide_megatron.tasks.in_training import Answered
from tide_megatron.train import metrics as module
from tide_megatron.train.cost import Cost, Devices
from tide_megatron.train.metrics import Metrics, MetricsOptions, means
from tide_megatron.train.progress import describe_step
from tide_megatron.train.sinks import JsonLines, Record, guarded

QUIET = MetricsOptions(every=2, tensorboard=False)


@pytest.fixture
def screen(monkeypatch):
    """Give a console that records what is printed; `screen.text()` returns it."""

    def make(**options):
        console = Console(record=True, width=200, **options)
        monkeypatch.setattr(rich, "get_console", lambda: console)
        return console

    return make


def clock_at(step, skipped=0, total=6):
    return Clock(step=step, total_steps=total, consumed=8 * (step + skipped), skipped=skipped)


COST = Cost(flops=3e9, peak_memory_bytes=0.0)
"""Of all ranks in a step."""


def opened(folder, options=QUIET, *, clock=None, is_first=True, phases=None, peak=None):
    return Metrics(
        options,
        folder,
        clock or clock_at(0),
        phases=phases or Phases(),
        devices=Devices(number=4, peak_flops=peak),
        recipe={"seed": 1} if is_first else None,
    )


def run_steps(metrics, first, last, loss=float):
    for step in range(first, last + 1):
        metrics.step(
            clock_at(step),
            averaged={"loss": loss(step), "grad_norm": 2.0 * step},
            latest={"learning_rate": 0.1 * step},
            tokens=100,
            cost=COST,
        )


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_averages_losses_since_the_last_one_and_takes_rates_as_they_are(tmp_path):
    with opened(tmp_path, MetricsOptions(every=4, tensorboard=False)) as metrics:
        run_steps(metrics, 1, 6)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 4, 6]  # first, every fourth, last
    assert [line["loss"] for line in lines] == [1.0, 3.0, 5.5]
    assert [line["grad_norm"] for line in lines] == [2.0, 6.0, 11.0]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.1, 0.4, 0.6])
    assert all(line["kind"] == "train" and line["consumed"] == 8 * line["step"] for line in lines)
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 2**20 for line in lines)


def test_skipped_steps_count_as_attempts_and_do_not_poison_the_mean(tmp_path):
    with opened(tmp_path) as metrics:
        for step, skipped, loss in [(1, 0, 1.0), (1, 1, math.nan), (1, 2, math.inf), (2, 2, 3.0)]:
            metrics.step(clock_at(step, skipped), averaged={"loss": loss}, latest={}, tokens=1, cost=COST)
    lines = lines_of(tmp_path)
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, 0), (1, 1), (2, 2)]
    assert [line["loss"] for line in lines] == [1.0, None, 3.0]


def test_a_term_is_averaged_over_the_steps_that_had_it():
    assert means([{"loss": 1.0}, {"loss": 3.0, "loss/kl": 5.0}]) == {"loss": 2.0, "loss/kl": 5.0}
    assert math.isnan(means([{"loss": math.nan}])["loss"])


def test_other_ranks_write_nothing_but_may_call_everything(tmp_path, screen):
    console = screen()
    with opened(tmp_path / "run", is_first=False) as metrics:
        run_steps(metrics, 1, 6)
        metrics.evaluated(clock_at(6), {"nll_per_byte": 1.0})
    assert not (tmp_path / "run").exists()
    assert console.export_text() == ""


def test_each_line_is_on_disk_before_the_next_step(tmp_path):
    with opened(tmp_path) as metrics:
        run_steps(metrics, 1, 1)
        assert len(lines_of(tmp_path)) == 1


def test_a_resumed_file_reads_as_if_the_run_had_never_stopped(tmp_path):
    with opened(tmp_path) as metrics:
        run_steps(metrics, 1, 3)
        metrics.evaluated(clock_at(3), {"nll_per_byte": 1.5})
        run_steps(metrics, 4, 5)  # done, but the checkpoint is of step 3
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2, "consumed": 1')  # a kill in the middle of a line
    with opened(tmp_path, clock=clock_at(3)) as metrics:
        run_steps(metrics, 4, 6)
    assert [(line["kind"], line["step"]) for line in lines_of(tmp_path)] == [
        ("train", 1),
        ("train", 2),
        ("evaluate", 3),
        ("train", 4),
        ("train", 6),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "status.json", "status.html"}


@pytest.mark.parametrize(
    "cut", ['{"kind": "tr', '{"kind": "train", "step": 2, "consumed": 16}', "[]\n", "7\n"]
)
def test_a_line_that_a_kill_cut_short_goes(tmp_path, cut):
    with opened(tmp_path) as metrics:
        run_steps(metrics, 1, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)  # the second one lacks nothing but its line end
    opened(tmp_path, clock=clock_at(2)).close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1]


def test_tensorboard_holds_the_same_values(tmp_path):
    with opened(tmp_path, MetricsOptions(every=1)) as metrics:
        run_steps(metrics, 1, 2)
        metrics.evaluated(clock_at(2), {"nll_per_byte": 1.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]
    assert [event.value for event in events.Scalars("evaluate/nll_per_byte")] == [1.25]


ANSWER = Answered(task="sums", question="q1", prompt="What is\n1 + 1?", reply="*2*", score=1.0, why="right")


def test_tasks_and_their_replies_are_told_everywhere(tmp_path, screen):
    console = screen()
    with opened(tmp_path, MetricsOptions(every=1)) as metrics:
        metrics.asked(clock_at(2), {"sums": 0.25}, [ANSWER, dataclasses.replace(ANSWER, reply="x" * 500)])
    (line,) = lines_of(tmp_path)
    assert (line["kind"], line["step"], line["sums"]) == ("tasks", 2, 0.25)
    assert line["replies"][0] == dataclasses.asdict(ANSWER)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert [event.value for event in events.Scalars("tasks/sums")] == [0.25]
    (text,) = events.Tensors("tasks/replies/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "**sums q1** right\n\n    What is\n    1 + 1?\n\n---\n\n    *2*" in shown
    told = console.export_text()
    assert "step 2: tasks  sums 25.0%" in told
    assert "  sums q1 (right): 'What is\\n1 + 1?' -> '*2*'" in told
    assert f"-> '{'x' * 160}...'" in "".join(told.split("\n"))


def test_wandb_works_offline_and_goes_on_in_the_same_run(tmp_path, caplog):
    options = MetricsOptions(every=1, tensorboard=False, wandb="offline", project="test")
    before = signal.getsignal(signal.SIGINT)
    with opened(tmp_path, options) as metrics:
        run_steps(metrics, 1, 1)
        metrics.asked(clock_at(1), {"sums": 0.25}, [ANSWER])
        assert signal.getsignal(signal.SIGINT) is before
    assert "wandb is off" not in caplog.text
    identity = (tmp_path / "wandb" / "run-id").read_text()
    time.sleep(1.1)  # wandb names folders by the second
    with opened(tmp_path, options, clock=clock_at(1)) as metrics:
        run_steps(metrics, 2, 2)
    assert (tmp_path / "wandb" / "run-id").read_text() == identity
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity.strip()}.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 30  # wandb's own process writes; on a busy machine a little later
    while not all(b"grad_norm" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline, "wandb wrote no metrics"
        time.sleep(0.2)


class Broken:
    """A sink that fails at the second record."""

    def __init__(self):
        self.records = 0

    def write(self, record):
        self.records += 1
        if self.records == 2:
            raise OSError("no route to host")

    def close(self):
        raise AssertionError("a sink that failed is not touched again")


def test_a_convenience_that_fails_is_logged_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    broken = Broken()
    monkeypatch.setattr(module, "WeightsAndBiases", lambda *_: broken)
    monkeypatch.setattr(module, "TensorBoard", lambda *_: 1 / 0)
    with opened(tmp_path, MetricsOptions(every=1, wandb="online")) as metrics:
        run_steps(metrics, 1, 6)
    assert len(lines_of(tmp_path)) == 6
    assert broken.records == 2
    words = [record.getMessage() for record in caplog.records]
    assert words == [
        "tensorboard is off for the rest of this run: ZeroDivisionError: division by zero",
        "wandb is off for the rest of this run: OSError: no route to host",
    ]


def test_a_guarded_sink_that_works_is_closed():
    closed = []

    class Sink:
        def write(self, record):
            closed.append(record)

        def close(self):
            closed.append("closed")

    sink = guarded("x", Sink)
    sink.write("record")
    sink.close()
    assert closed == ["record", "closed"]


def test_plain_lines_where_there_is_no_terminal(tmp_path, screen):
    console = screen(force_terminal=False)
    phases = Phases()
    with opened(tmp_path, phases=phases) as metrics:
        with phases("student"):
            time.sleep(0.02)
        metrics.step(
            clock_at(1),
            averaged={"loss": 2.5, "loss/ce": 2.0, "loss/kl": 0.5, "grad_norm": 1.25},
            latest={"learning_rate": 4e-3, "lambda": 0.25},
            tokens=1_234_567,
            cost=COST,
        )
        metrics.evaluated(clock_at(1), {"nll_per_byte": 1.75, "masked_accuracy": 0.25})
    text = console.export_text()
    assert "step 1/6" in text
    assert "loss 2.5000  (ce 2.0000, kl 0.5000)  grad 1.25  lr 4.00e-03" in text
    assert "λ 0.250" in text
    assert "k tokens/s" in text
    assert "step 1: held out  nll per byte 1.7500  masked accuracy 0.2500" in text
    assert "where the time went: student 100.0%" in text


def test_long_records_weigh_more_in_where_the_time_went(tmp_path, screen, monkeypatch):
    console = screen(force_terminal=False)
    now, phases = [100.0], Phases()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with opened(tmp_path, phases=phases) as metrics:
        for step, (seconds, spent) in enumerate([(1.0, {"head": 1.0}), (3.0, {"student": 3.0})], start=1):
            now[0] += seconds
            monkeypatch.setattr(phases, "take", lambda spent=spent: spent)
            held = {name: int(share * 1e9) for name, share in spent.items()}
            monkeypatch.setattr(phases, "take_peaks", lambda held=held: held)  # on a CPU there are none
            metrics.step(clock_at(step), averaged={"loss": 1.0}, latest={}, tokens=1, cost=COST)
    assert "where the time went: student 75.0%  head 25.0%" in console.export_text(clear=False)
    assert "most memory held: student 3 GB  head 1 GB" in console.export_text(clear=False)
    assert [line["seconds"] for line in lines_of(tmp_path)] == [1.0, 3.0]
    assert lines_of(tmp_path)[1]["peak_bytes/student"] == 3e9


def test_a_bar_in_a_terminal(tmp_path, screen):
    console = screen(force_terminal=True)
    console.width = 60
    with opened(tmp_path) as metrics:
        run_steps(metrics, 1, 6)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert any(line.startswith("step 6/6 ") and "eta 0:00:00" in line for line in lines)
    assert any(line.startswith("loss 5.5000  grad 11  lr 6.00e-01") and len(line) <= 60 for line in lines)


def test_pauses_do_not_lower_tokens_per_second(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    phases = Phases()
    monkeypatch.setattr(phases, "take", lambda: {"student": 2.0, "evaluate": 3.0, "checkpoint": 4.0})
    with opened(tmp_path, phases=phases) as metrics:
        now[0] += 10.0
        metrics.step(clock_at(1), averaged={"loss": 1.0}, latest={}, tokens=600, cost=COST)
    (line,) = lines_of(tmp_path)
    assert line["tokens_per_second"] == 200.0
    assert line["seconds_per_step"] == 3.0
    assert line["phase/student"] == 0.2
    assert line["phase/evaluate"] == 0.3


def test_utilisation_is_of_all_devices_and_leaves_pauses_out(tmp_path, monkeypatch):
    now, phases = [100.0], Phases()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with opened(tmp_path, phases=phases, peak=1e9) as metrics:
        monkeypatch.setattr(phases, "take", lambda: {"student": 2.0, "evaluate": 3.0, "checkpoint": 4.0})
        now[0] += 8.0
        metrics.step(clock_at(1), averaged={"loss": 1.0}, latest={}, tokens=600, cost=COST)
        monkeypatch.setattr(phases, "take", dict)
        for step in (2, 3, 4):  # a record at 2 and one at 4, of two steps
            now[0] += 1.0
            metrics.step(clock_at(step), averaged={"loss": 1.0}, latest={}, tokens=600, cost=COST)
    first, second, third = lines_of(tmp_path)
    assert first["seconds_per_step"] == 1.0
    assert first["tokens_per_second_per_device"] == 150.0
    assert first["tflops_per_device"] == pytest.approx(3e9 / 4 / 1e12)
    assert first["mfu"] == second["mfu"] == third["mfu"] == pytest.approx(3 / 4)
    assert (second["seconds"], third["seconds"]) == (1.0, 2.0)


def test_without_a_peak_there_is_no_mfu(tmp_path):
    with opened(tmp_path) as metrics:
        run_steps(metrics, 1, 1)
    (line,) = lines_of(tmp_path)
    assert "mfu" not in line
    assert line["tflops_per_device"] > 0


def test_the_largest_memory_may_be_another_ranks(tmp_path):
    with opened(tmp_path, MetricsOptions(every=1, tensorboard=False)) as metrics:
        for step, told in ((1, 1.0), (2, 1e18)):
            cost = Cost(flops=0.0, peak_memory_bytes=told)
            metrics.step(clock_at(step), averaged={"loss": 1.0}, latest={}, tokens=1, cost=cost)
    first, second = lines_of(tmp_path)
    assert 2**20 < first["peak_memory_bytes"] < 1e18 == second["peak_memory_bytes"]


def test_times_before_the_first_step_are_in_no_record(tmp_path):
    phases = Phases()
    with phases("exchange"):  # what teachers exchange when they are tried out
        time.sleep(0.01)
    with opened(tmp_path, phases=phases) as metrics:
        run_steps(metrics, 1, 1)
    assert "phase/exchange" not in lines_of(tmp_path)[0]


def test_the_console_line_has_rates_utilisation_and_memory():
    values = {
        "loss": 1.0,
        "tokens_per_second": 48_000.0,
        "tokens_per_second_per_device": 6_000.0,
        "tflops_per_device": 123.4,
        "mfu": 0.1247,
        "peak_memory_bytes": 61.2e9,
        "phase/head": 0.5,
    }
    line = "48.0k tokens/s (6.0k a device)  123 TFLOP/s a device  MFU 12.5%  61.2 GB peak  head 50%"
    assert describe_step(values) == f"loss 1.0000  {line}"
    del values["mfu"]
    assert "TFLOP/s a device  61.2 GB peak" in describe_step(values)


def test_records_that_are_not_json_numbers_become_null(tmp_path):
    sink = JsonLines(tmp_path, clock_at(0))
    sink.write(Record(kind="train", clock=clock_at(1), values={"loss": math.inf, "grad_norm": 1.0}))
    sink.close()
    (line,) = lines_of(tmp_path)
    assert (line["loss"], line["grad_norm"]) == (None, 1.0)


def test_a_disk_that_is_full_ends_the_run_in_one_line(tmp_path):
    sink = JsonLines(tmp_path, clock_at(0))
    sink._file.close()
    sink._file = Path("/dev/full").open("a")  # noqa: SIM115 - the sink closes it
    said = r"^.*metrics\.jsonl: cannot be written \(No space left on device\); make room .* whole checkpoint$"
    with pytest.raises(TideError, match=said):
        sink.write(Record(kind="train", clock=clock_at(1), values={"loss": 1.0}))
    with pytest.raises(TideError, match=said):
        sink.close()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"wandb": "yes"}, {"evry": 1}])
def test_options_refuse_what_they_do_not_know(wrong):
    with pytest.raises(ValidationError):
        MetricsOptions(**wrong)
