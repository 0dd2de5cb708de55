"""A comparison of runs that can be read on its own: a table, plots, samples, and words that keep it honest.

Input is plain values (what `Likelihood.summary` returns, what `metrics.jsonl` holds), so a report can be made
again from files. The table labels each bound by its context kind: bounds of different kinds are not
comparable.

Evaluation masks the same tokens of the same samples for every run, so two runs are compared sample by sample:
what makes a sample hard drops out of the difference. The interval is Student's over the pairs (samples of one
run pair, or seeds). It says how sure the difference is for other samples (or seeds) like these, and nothing
about other base models or data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import rich.box
import rich.table

from tide_megatron.base.errors import DataError, nearest
from tide_megatron.evaluate.plots import (
    Scores,
    plot_differences,
    plot_noise_levels,
    plot_training,
    read_metrics,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTable:
    """Rows of text, for a terminal or for Markdown; the first column is left-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> rich.table.Table:
        """Return the table for a rich console."""
        table = rich.table.Table(title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown, without its title."""
        alignments = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [self.columns, alignments, *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A mean paired difference and its 95 % interval."""

    mean: float
    ci95: tuple[float, float]
    """(low, high); both NaN for a single pair."""
    pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        low, high = self.ci95
        return low > 0 or high < 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptReplies:
    """One prompt with what each run wrote."""

    prompt: str
    replies: Mapping[str, str]
    """Run name (or "reference text") -> reply."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a comparison shows."""

    title: str
    scores: Scores
    """Run name -> scores, in the order of the table."""
    reference: str
    """The run that differences are taken to."""
    teachers: Scores = dataclasses.field(default_factory=dict)
    """Teacher name -> scores, listed under the runs."""
    run_folders: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """Run name -> folder with `metrics.jsonl`, for the training curves."""
    samples: Sequence[PromptReplies] = ()
    lead: Sequence[str] = ()
    """Paragraphs that the report begins with."""
    notes: Sequence[str] = ()
    """Sentences that belong under the table: data, what a step costs, what is not claimed."""

    def write(self, folder: Path) -> Path:
        """Write `report.md` and its PNG files into a folder and return the path of `report.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        differences = differences_to(self.scores, self.reference)
        order = [*self.scores, *self.teachers]
        table = comparison_table(self.scores, self.reference, teachers=self.teachers)
        parts = [f"# {self.title}", *self.lead, f"## {table.title}", table.markdown()]
        parts += list(self.notes)
        parts.append(
            "Figures are held-out bounds in nats per byte of reply (lower is better) at fixed noises, over a "
            "fixed draw of samples that has each source in its share."
        )
        if any("tempered_nll_per_byte" in score for score in self.scores.values()):
            parts.append(
                "*Tempered* is the bound when all logits are divided by one temperature, fitted on the other "
                "half of the samples: what is left of a difference there is not a matter of confidence. "
                "*ECE* is the expected calibration error, over 15 bins of confidence."
            )
        if differences:
            pairs = next(iter(differences.values())).pairs
            parts.append(
                f"Differences to {self.reference} are paired over {pairs} samples, with 95 % t intervals: "
                "they speak about other samples, not about other seeds or base models."
            )
            intervals = {name: (pair.mean, *pair.ci95) for name, pair in differences.items()}
            plot_differences(intervals, self.reference, folder / "differences.png", order=order)
            parts.append("![paired differences](differences.png)")
        by_time = {
            name: score for name, score in {**self.scores, **self.teachers}.items() if score.get("by_time")
        }
        if self.reference in by_time:
            plot_noise_levels(
                by_time, self.reference, folder / "noise_levels.png", compared=list(differences)
            )
            parts.append("## By noise level\n\n![scores by noise level](noise_levels.png)")
        sources = source_table({**self.scores, **self.teachers})
        if sources is not None:
            parts += [f"## {sources.title}", sources.markdown()]
        if self.run_folders:
            records = {name: read_metrics(path) for name, path in self.run_folders.items()}
            plot_training(records, folder / "training.png", order=order)
            parts.append("## Training\n\n![training curves](training.png)")
        if self.samples:
            parts.append("## Samples")
            parts += [_sample_text(number, sample) for number, sample in enumerate(self.samples, start=1)]
        path = folder / "report.md"
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        return path


def comparison_table(scores: Scores, reference: str, *, teachers: Scores | None = None) -> TextTable:
    """Compare runs: bound, accuracy, paired difference to the reference run; more where it is known.

    That is the bound after a fitted temperature and the calibration error (`calibration`), and CPU time.

    Args:
        scores: run name -> scores.
        reference: the run that differences are taken to.
        teachers: further rows without differences.

    Raises:
        DataError: the reference is not among the runs, or a score lacks a figure.
    """
    differences = differences_to(scores, reference)
    everybody = {**scores, **(teachers or {})}
    kinds = {str(score.get("context", "unknown")) for score in everybody.values()}
    has_cost = any("cpu_seconds" in score for score in everybody.values())
    is_calibrated = any("tempered_nll_per_byte" in score for score in everybody.values())
    rows = []
    for name, score in everybody.items():
        row = [name, f"{_figure_of(name, score, 'nll_per_byte'):.4f}"]
        row += [str(score.get("context", "unknown"))] * (len(kinds) > 1)
        row.append(f"{_figure_of(name, score, 'masked_accuracy'):.1%}")
        if is_calibrated:
            row += [_or_empty(score, "tempered_nll_per_byte", ".4f")]
            row += [_or_empty(score, "expected_calibration_error", ".1%")]
        row.append("reference" if name == reference else _in_words(differences.get(name)))
        row += [_or_empty(score, "cpu_seconds", ".0f")] * has_cost
        rows.append(tuple(row))
    columns = [
        "run",
        "nats/byte",
        *["bound"] * (len(kinds) > 1),
        "accuracy",
        *["tempered", "ECE"] * is_calibrated,
        "difference, 95 %",
        *["CPU s"] * has_cost,
    ]
    bound = (
        f"{min(kinds)} bound" if len(kinds) == 1 else "bounds of several kinds: not comparable across kinds"
    )
    return TextTable(title=f"Held-out scores ({bound})", columns=tuple(columns), rows=tuple(rows))


def source_table(scores: Scores) -> TextTable | None:
    """Compare runs source by source, in nats per byte; None where the data has one source only."""
    by_source = {
        name: {part["source"]: part for part in score.get("by_source", ())} for name, score in scores.items()
    }
    sizes = {source: part["samples"] for parts in by_source.values() for source, part in parts.items()}
    if len(sizes) < 2:
        return None
    rows = [
        (name, *(f"{parts[source]['nll_per_byte']:.4f}" if source in parts else "" for source in sizes))
        for name, parts in by_source.items()
        if parts
    ]
    columns = ("run", *(f"{source} ({size})" for source, size in sizes.items()))
    return TextTable(title="Nats per byte by source (samples in brackets)", columns=columns, rows=tuple(rows))


def differences_to(scores: Scores, reference: str) -> dict[str, PairedDifference]:
    """Return each other run's paired NLL difference (nats per byte), where the bound is of the same kind.

    Raises:
        DataError: the reference is not among the runs, or runs were scored on different samples.
    """
    if reference not in scores:
        raise DataError(f"reference run {reference!r} is not among the scores; {nearest(reference, scores)}")
    base = scores[reference]
    for name, score in scores.items():
        if score.get("sample_ids", wanted := base.get("sample_ids")) != wanted and wanted is not None:
            raise DataError(f"{name} and {reference} were scored on different samples; score both again")
    return {
        name: paired_difference(score["sample_nll_per_byte"], base["sample_nll_per_byte"])
        for name, score in scores.items()
        if name != reference
        and "sample_nll_per_byte" in score
        and "sample_nll_per_byte" in base
        and score.get("context") == base.get("context")
    }


def paired_difference(one: Sequence[float], other: Sequence[float]) -> PairedDifference:
    """Return the mean of `one - other` over pairs, with its 95 % t interval.

    Args:
        one: a value per pair, for example NLL per byte of each sample under the distilled student.
        other: the value of the same pairs under the reference.

    Raises:
        DataError: no pairs, or sequences of different lengths.
    """
    if len(one) != len(other) or not len(one):
        raise DataError(
            f"paired values: {len(one)} against {len(other)}; score both runs on the same held-out samples"
        )
    values = numpy.asarray(one, dtype=numpy.float64) - numpy.asarray(other, dtype=numpy.float64)
    mean, pairs = float(values.mean()), len(values)
    half = math.nan
    if pairs > 1:
        half = t_quantile(pairs - 1) * float(values.std(ddof=1)) / math.sqrt(pairs)
    return PairedDifference(mean=mean, ci95=(mean - half, mean + half), pairs=pairs)


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """Return q with P(|T| < q) = `share` for Student's T, good to 5 digits.

    With T = sqrt(freedom) * tan(angle) the density of the angle is proportional to cos(angle)^(freedom - 1),
    which is integrated on a grid: `statistics` has no Student's T, and no dependency brings SciPy.
    """
    # Beyond 12 standard deviations of the angle nothing is left to integrate.
    angles = numpy.linspace(0.0, min(math.pi / 2, 12 / math.sqrt(freedom)), 20_001)
    density = numpy.cos(angles) ** (freedom - 1)
    mass = numpy.concatenate([[0.0], numpy.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(numpy.interp(share * mass[-1], mass, angles)))


def _figure_of(name: str, score: Mapping[str, Any], key: str) -> float:
    if key not in score:
        raise DataError(f"scores of {name!r} lack {key!r}; evaluate the run again")
    return float(score[key])


def _or_empty(score: Mapping[str, Any], key: str, form: str) -> str:
    return format(score[key], form) if key in score else ""


def _in_words(difference: PairedDifference | None) -> str:
    if difference is None:
        return ""
    low, high = difference.ci95
    return f"{difference.mean:+.4f} ± {(high - low) / 2:.4f}"


def _sample_text(number: int, sample: PromptReplies) -> str:
    parts = [f"**{number}.** Prompt:\n\n{_fenced(sample.prompt)}"]
    parts += [f"{name}:\n\n{_fenced(text)}" for name, text in sample.replies.items()]
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    """Quote a text so that nothing in it can end the quotation."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"
