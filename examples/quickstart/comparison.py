"""Variants of one recipe beside each other: the same base student, steps, tokens, seed and learning rate.

What the examples' `run.py` share: train every variant on 4 CPU ranks, score base student and teachers on the
same held-out samples, and write result.json, report.md and plots. Every variant is compared with two students
without a teacher at equal steps (undistilled; hard twin, whose gold tokens have the distilling weight: the
harder one to beat, so differences are taken to it), and with an undistilled one that was given as much CPU
time as the distilled one took. With several seeds a second table follows; intervals of the first one are over
held-out samples of the first seed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
import typer

from tide_megatron.decode.options import Decoding
from tide_megatron.decode.ranks import answer_prompts
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.likelihood import score_folder
from tide_megatron.evaluate.options import Evaluation
from tide_megatron.evaluate.report import (
    PromptReplies,
    Report,
    TextTable,
    comparison_table,
    paired_difference,
)
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.parallel.layout import Layout
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe

# Read when a rank starts. Models this small lose more at the barriers of two threads than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

STUDENT = Path("examples/quickstart/models/student")
RANKS = 4
CONTEXT = Context(kind="block_diffusion", block_size=16)
SAMPLES = 512
SEEDS = (11, 12, 13)
KEPT = (
    "nll_per_byte",
    "masked_accuracy",
    "tempered_nll_per_byte",
    "temperature",
    "expected_calibration_error",
    "by_source",
    "cpu_seconds",
)
OF_A_SEED = ("nll_per_byte", "masked_accuracy", "tempered_nll_per_byte", "cpu_seconds")
LONGER = "undistilled_equal_cpu"
"""The undistilled student with as much CPU time as a distilled one."""

Results = Mapping[str, dict[str, Any]]
"""Variant -> what training it returned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher as recipes and tables name it, how it is cut over the ranks, and how its line is scored."""

    name: str
    folder: Path
    data: Path
    """Held-out data in the teacher's own tokens."""
    layout: Layout
    context: Context = CONTEXT

    def words(self) -> list[str]:
        """Return what adds the teacher to a recipe, in its own layout."""
        key = f"teachers.{self.name}"
        cuts = {axis: size for axis, size in dataclasses.asdict(self.layout).items() if size > 1}
        return [
            f"{key}.folder={self.folder}",
            f"{key}.context.kind={self.context.kind}",
            f"{key}.context.block_size={self.context.block_size}",
            *(f"{key}.layout.{axis}={size}" for axis, size in cuts.items()),
        ]

    def listen(self, kind: str, weight: float, *options: str) -> list[str]:
        """Return what adds the teacher and one loss that listens to it; options as `key=value`.

        The loss is named after both, so that a recipe may join the words of several teachers.
        """
        words = [f"kind={kind}", f"teacher={self.name}", f"weight={weight}", *options]
        return [*self.words(), *(f"losses.{self.name}_{kind}.{word}" for word in words)]

    def demonstrate(self) -> list[str]:
        """Return what shows the teacher two complementary views (CompDemo)."""
        return [f"teachers.{self.name}.view=complementary"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and where it is written."""

    title: str
    recipe: Path
    out: Path
    held_out: Path
    """Held-out data in the student's tokens."""
    student: Path = STUDENT
    """The base student."""
    context: Context = CONTEXT
    """Its context."""
    teachers: Sequence[Teacher]
    """All that some variant listens to."""
    variants: Mapping[str, Sequence[str]]
    """Name -> words that change the recipe, in the order of the tables."""
    matched: str
    """The distilled variant whose CPU time the undistilled student is given too."""
    references: Sequence[str] = ("hard_twin", "undistilled")
    """Variants without a teacher that differences are taken to; the first one is the tables'."""
    shown: Sequence[str] = ()
    """Variants that answer a few held-out requests in the report."""

    def run(self, seeds: Sequence[int]) -> list[Results]:
        """Train all variants, and the undistilled one for longer, with every seed; return results by seed."""
        return [self._of_seed(seed, first=seed == seeds[0]) for seed in seeds]

    def _of_seed(self, seed: int, *, first: bool) -> Results:
        results = {name: self._train(name, words, seed, first=first) for name, words in self.variants.items()}
        longer = self._train(LONGER, self.longer(results), seed, first=first)
        return {"undistilled": results.pop("undistilled"), LONGER: longer, **results}

    def longer(self, results: Results) -> list[str]:
        """Return the words of the undistilled run of as much CPU time as the matched variant took."""
        plain, taught = results["undistilled"], results[self.matched]
        steps = round(plain["clock"]["step"] * taught["cpu_seconds"] / plain["cpu_seconds"])
        return [*self.variants["undistilled"], f"steps={steps}"]

    def _train(self, name: str, words: Sequence[str], seed: int, *, first: bool) -> dict[str, Any]:
        """Train one variant on fresh ranks."""
        folder = self.out / (name if first else f"{name}-seed{seed}")
        always = [f"folder={folder}", f"seed={seed}", "evaluation.calibration=true"]
        recipe, tree = load_recipe(self.recipe, [*always, *words])
        rich.print(f"\n[bold]{name}[/] (seed {seed}): {recipe.steps} steps of {recipe.batch.samples} samples")
        result: dict[str, Any] = run_ranks(train, (recipe, tree, False), RANKS, "cpu")
        if not result["finished"]:
            raise typer.Exit(1)
        return result

    def summarise(self, results: Sequence[Results], seeds: Sequence[int]) -> dict[str, Any]:
        """Return what result.json holds of the variants: figures, paired differences, figures by seed."""
        first = results[0]
        summary: dict[str, Any] = {}
        for name, result in first.items():
            summary[name] = {key: result[key] for key in KEPT if key in result}
            summary[name]["words"] = self.longer(first) if name == LONGER else list(self.variants[name])
            summary[name]["steps"] = result["clock"]["step"]
            pairs = {
                reference: paired_difference(
                    result["sample_nll_per_byte"], first[reference]["sample_nll_per_byte"]
                )
                for reference in (*self.references, LONGER)
                if reference in first and reference != name
            }
            summary[name]["differences"] = {
                reference: {"mean": pair.mean, "ci95": list(pair.ci95)} for reference, pair in pairs.items()
            }
        if len(seeds) > 1:
            summary["seeds"] = [
                {"name": name, "seed": seed, **{key: result[key] for key in OF_A_SEED if key in result}}
                for seed, by_name in zip(seeds, results, strict=True)
                for name, result in by_name.items()
            ]
        return summary

    def write(
        self,
        results: Sequence[Results],
        summary: dict[str, Any],
        notes: Sequence[str],
        began: float,
        *,
        lead: Sequence[str] = (),
    ) -> None:
        """Score base student and teachers, write result.json, report and plots, and print table and notes.

        Args:
            results: of `run`.
            summary: of `summarise`, with what else result.json is to hold.
            notes: sentences on the figures.
            began: when the script did, on the monotonic clock.
            lead: paragraphs that the report begins with.
        """
        first = results[0]
        base = _score(self.student, self.held_out, self.context)
        answers = {one: _score(one.folder, one.data, one.context) for one in self.teachers}
        summary = summary | {
            "base_student": {key: base[key] for key in KEPT if key in base},
            "teachers": [
                {"name": one.name, "layout": str(one.layout), "context": answer["context"]}
                | {key: answer[key] for key in KEPT if key in answer}
                for one, answer in answers.items()
            ],
            "ranks": RANKS,
            "seconds": time.monotonic() - began,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / "result.json"
        file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        scores = {"base student": base, **first}
        teachers = {f"teacher {one.name} {one.layout}": answer for one, answer in answers.items()}
        reference = self.references[0]
        rich.print(comparison_table(scores, reference, teachers=teachers).rich())
        seeds = [seed_table(results, reference)] if len(results) > 1 else []
        notes = [*notes, *self.cautions(summary)]
        report = Report(
            title=self.title,
            scores=scores,
            reference=reference,
            teachers=teachers,
            run_folders={name: self.out / name for name in first},
            samples=self._samples() if self.shown else (),
            lead=lead,
            notes=[*notes, *(f"## {table.title}\n\n{table.markdown()}" for table in seeds)],
        ).write(self.out)
        for table in seeds:
            rich.print(table.rich())
        for sentence in notes:
            rich.print(sentence)
        rich.print(f"report: {report}, figures: {file} ({summary['seconds']:.0f} s in all)")

    def cautions(self, summary: Mapping[str, Any]) -> list[str]:
        """Say what holds of every comparison: what equal CPU time gives, what stays after a temperature."""
        taught, longer, twin = (summary[name] for name in (self.matched, LONGER, self.references[0]))
        pair, seconds = taught["differences"][LONGER], taught["cpu_seconds"]
        sentences = [
            f"Given the CPU time of {self.matched} ({seconds:.0f} s; {longer['steps']} steps in place of "
            f"{taught['steps']}), the undistilled student reaches {longer['nll_per_byte']:.4f}: there "
            f"{self.matched} is {_told(pair['mean'])} ({in_words(pair)})."
        ]
        if "tempered_nll_per_byte" in taught:
            left = taught["tempered_nll_per_byte"] - twin["tempered_nll_per_byte"]
            sentences.append(
                f"After one fitted temperature each, {self.matched} differs from {self.references[0]} by "
                f"{left:+.4f} nats/byte, before by {taught['nll_per_byte'] - twin['nll_per_byte']:+.4f}."
            )
        return [
            *sentences,
            "One base student, one data set; intervals are over held-out samples of one seed unless they say "
            "otherwise.",
        ]

    def _samples(self) -> list[PromptReplies]:
        """Let the shown students answer a few held-out requests."""
        text = Path("runs/quickstart-data/text/test.jsonl")
        lines = text.read_text(encoding="utf-8").splitlines()[:400:150]
        chats = [json.loads(line)["messages"] for line in lines]
        prompts = [chat[0]["content"] for chat in chats]
        decoding = Decoding(new_tokens=64)
        replies = {
            name: run_ranks(
                answer_prompts, (self.out / name / "model", prompts, self.context, decoding), 1, "cpu"
            )
            for name in self.shown
        }
        return [
            PromptReplies(
                prompt=prompt,
                replies={
                    "reference": chat[1]["content"],
                    **{name: of_model[index].text for name, of_model in replies.items()},
                },
            )
            for index, (prompt, chat) in enumerate(zip(prompts, chats, strict=True))
        ]


def hard_twin(weight: float) -> list[str]:
    """Return what gives gold tokens a distilled run's extra weight without a teacher."""
    words = ["kind=cross_entropy", "timestep_weight=uniform", "normalization=hidden", f"weight={weight}"]
    return [f"losses.twin.{word}" for word in words]


def seed_table(results: Sequence[Results], reference: str) -> TextTable:
    """Compare variants over seeds: mean and standard deviation, paired difference over seeds, cost."""
    rows = []
    for name in results[0]:
        runs = [by_name[name] for by_name in results]
        scores = [run["nll_per_byte"] for run in runs]
        words = "reference"
        if name != reference:
            pair = paired_difference(scores, [by_name[reference]["nll_per_byte"] for by_name in results])
            words = f"{pair.mean:+.4f} ± {(pair.ci95[1] - pair.ci95[0]) / 2:.4f}"
        accuracy = statistics.mean(run["masked_accuracy"] for run in runs)
        cost = statistics.mean(run["cpu_seconds"] for run in runs)
        bound = f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}"
        rows.append((name, bound, words, f"{accuracy:.1%}", f"{cost:.0f}"))
    return TextTable(
        title=f"Over {len(results)} seeds (one base student, the same teachers)",
        columns=("run", "nats/byte, sd", "difference, 95 % over seeds", "accuracy", "CPU s"),
        rows=tuple(rows),
    )


def _told(difference: float) -> str:
    return f"{abs(difference):.4f} nats/byte {'better' if difference < 0 else 'worse'}"


def in_words(pair: Mapping[str, Any]) -> str:
    """Return a paired difference's interval as a sentence takes it."""
    low, high = pair["ci95"]
    return f"95 % interval {low:+.4f} to {high:+.4f}"


def _score(folder: Path, data: Path, context: Context) -> dict[str, Any]:
    options = Evaluation(samples=SAMPLES, calibration=True)
    scores: dict[str, Any] = run_ranks(score_folder, (folder, data, context, options), RANKS, "cpu")
    return scores
