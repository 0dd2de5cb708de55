"""The console of a run: a live bar in a terminal, plain lines elsewhere, then where the time went."""

from __future__ import annotations

import datetime
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping

import rich
from rich import progress
from rich.console import RenderableType
from rich.text import Text

from tide_megatron.base.clock import Clock, Pace
from tide_megatron.base.log import SHOWN
from tide_megatron.base.units import in_bytes
from tide_megatron.tasks.in_training import Answered
from tide_megatron.train.sinks import Record

journal = logging.getLogger(SHOWN)

MOST_SHOWN = 160
"""Characters of a prompt or a reply."""
REFRESHES_PER_SECOND = 4
"""Of the live bar: enough to look alive, little enough to cost nothing."""


class _Bar(progress.Progress):
    """A progress bar with a line of facts below it, cut at the terminal's edge."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar's row and the facts."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.facts, no_wrap=True, overflow="ellipsis")


class Progress:
    """Shows steps, remaining time, losses, rates and phase shares of a run on the shared rich console."""

    def __init__(self, clock: Clock) -> None:
        """Show a bar if the console is a terminal."""
        self._console = rich.get_console()
        self._pace = Pace(clock)
        self._phases: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, float] = defaultdict(float)
        self._moved: dict[str, float] = {}
        self._bar: _Bar | None = None
        if self._console.is_terminal:
            self._bar = _Bar(
                progress.TextColumn("[bold]step"),
                progress.MofNCompleteColumn(),
                progress.BarColumn(bar_width=24),
                progress.TextColumn("{task.fields[eta]}"),
                console=self._console,
                refresh_per_second=REFRESHES_PER_SECOND,
            )
            self._task = self._bar.add_task("", total=clock.total_steps, completed=clock.step, eta="")
            self._bar.start()

    def advance(self, clock: Clock) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=clock.step, eta=self._eta(clock))

    def write(self, record: Record) -> None:
        """Show a record: training values in the bar or as a line, scores always as a line."""
        values = record.values
        for name, share in _phases(values).items():
            self._phases[name] += share * values["seconds"]
        for name, held in _named(values, "peak_bytes/").items():
            self._peaks[name] = max(held, self._peaks[name])
        self._moved |= _moved(values)
        if record.kind == "tasks":
            told = "  ".join(f"{name} {value:.1%}" for name, value in values.items())
            self._print(f"step {record.clock.step}: tasks  {told or 'prompts only'}")
            for answer in record.answers:
                self._print(f"  {answer.task} {answer.question} ({answer.why}): {_short(answer)}")
        elif record.kind == "evaluate":
            self._print(f"step {record.clock.step}: held out  {describe_scores(values)}")
        else:
            clock, facts = record.clock, describe_step(values)
            line = f"step {clock.step}/{clock.total_steps}  {self._eta(clock)}  {facts}"
            if self._bar is None:
                self._print(line)
            else:
                self._bar.facts = facts
                journal.info(line)

    def close(self) -> None:
        """Stop the bar and print the phase shares and peaks of the whole run."""
        if self._bar is not None:
            self._bar.stop()
        total = sum(self._phases.values())
        if total:
            shares = sorted(self._phases.items(), key=lambda item: -item[1])
            self._print(
                "where the time went: " + "  ".join(f"{name} {spent / total:.1%}" for name, spent in shares)
            )
        if self._peaks:
            peaks = sorted(self._peaks.items(), key=lambda item: -item[1])
            self._print("most memory held: " + "  ".join(f"{name} {in_bytes(held)}" for name, held in peaks))
        if self._moved:
            kinds = "  ".join(f"{kind} {in_bytes(moved)}" for kind, moved in self._moved.items())
            self._print(f"what was exchanged a step, over all ranks, at last: {kinds}")

    def _print(self, line: str) -> None:
        journal.info(line)
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _eta(self, clock: Clock) -> str:
        left = self._pace.seconds_left(clock)
        return "eta ?" if left is None else f"eta {datetime.timedelta(seconds=round(left))}"


def describe_step(values: Mapping[str, float]) -> str:
    """Say a training record in one line: losses first, then rates, then the three longest phases."""
    words = [f"loss {values['loss']:.4f}"]
    terms = [
        f"{name.removeprefix('loss/')} {value:.4f}"
        for name, value in values.items()
        if name.startswith("loss/")
    ]
    if len(terms) > 1:
        words.append(f"({', '.join(terms)})")
    if "grad_norm" in values:
        words.append(f"grad {values['grad_norm']:.3g}")
    if "learning_rate" in values:
        words.append(f"lr {values['learning_rate']:.2e}")
    for name, value in values.items():
        if name.split("/")[0] == "lambda":
            words.append(f"{name.replace('lambda', 'λ', 1)} {value:.3f}")
    words += _costs(values)
    moved = _moved(values)
    if moved:
        words.append(f"{in_bytes(sum(moved.values()))} exchanged")
    longest = sorted(_phases(values).items(), key=lambda item: -item[1])[:3]
    words.append(" ".join(f"{name} {share:.0%}" for name, share in longest))
    return "  ".join(word for word in words if word)


def _costs(values: Mapping[str, float]) -> list[str]:
    """Say rates, utilisation and memory."""
    all_of_them, of_one = (
        _thousands(values[name]) for name in ("tokens_per_second", "tokens_per_second_per_device")
    )
    words = [
        f"{all_of_them} tokens/s ({of_one} a device)",
        f"{values['tflops_per_device']:.3g} TFLOP/s a device",
        f"{in_bytes(values['peak_memory_bytes'])} peak",
    ]
    if "mfu" in values:
        words.insert(2, f"MFU {values['mfu']:.1%}")
    return words


def describe_scores(values: Mapping[str, float]) -> str:
    """Say held-out scores in one line; those by noise level are left to the other sinks."""
    return "  ".join(
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items() if "/" not in name
    )


def _short(answer: Answered) -> str:
    """Return prompt and reply in one line, as Python spells them."""
    texts = (answer.prompt, answer.reply)
    prompt, reply = (text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..." for text in texts)
    return f"{prompt!r} -> {reply!r}"


def _phases(values: Mapping[str, float]) -> dict[str, float]:
    return _named(values, "phase/")


def _moved(values: Mapping[str, float]) -> dict[str, float]:
    """Return bytes a step by kind, over all ranks (`parallel.exchange`)."""
    return _named(values, "bytes/")


def _named(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the values whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
