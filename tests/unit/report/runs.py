"""Folders of runs that nobody trained: what a run writes, made up, in any state of damage."""

import json

import yaml

from tests.tiny_run import recipe_tree
from tide_megatron.base.clock import Clock
from tide_megatron.report.reading import ReportedRun, read_run
from tide_megatron.train.history import note_end, note_start
from tide_megatron.train.resolve import build_recipe

STEPS = 40
TERMS = ("ce", "kl", "mix")


def write_run(
    folder,
    models,
    *,
    reached=STEPS,
    shift=0.0,
    teacher="moe",
    terms=TERMS,
    agreement=True,
    result=True,
    ranks=2,
):
    """Write a run's folder; its models and data are in another one (`write_tiny_run`)."""
    folder.mkdir(parents=True)
    tree = recipe_tree(models) | {"folder": str(folder), "steps": STEPS}
    tree["teachers"] = {teacher: tree["teachers"]["moe"]}
    ce, kl, mix = terms
    tree["losses"] = {
        ce: {"kind": "cross_entropy"},
        kl: {"kind": "kl", "teacher": teacher, "weight": 2.0},
        mix: {"kind": "tidal", "teacher": teacher},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(build_recipe(tree)[1], sort_keys=False))
    lines = []
    for step in range(1, reached + 1):
        lines.append(json.dumps(train_record(step, shift, terms)))
        if step % 20 == 0:
            lines.append(json.dumps(score_record(step, shift)))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if agreement:
        text = "".join(json.dumps(agreement_line(step, teacher)) + "\n" for step in (0, 20))
        (folder / "agreement.jsonl").write_text(text)
    note_start(folder, Clock(total_steps=STEPS), None, ranks)
    if result:
        note_end(folder, "finished", "", reached)
        (folder / "result.json").write_text(json.dumps(scores(shift)))
    return folder


def train_record(step, shift, terms):
    ce, kl, mix = terms
    return {
        "kind": "train",
        "step": step,
        "consumed": 8 * step,
        "skipped": 0,
        "time": "2026-01-01T00:00:00+00:00",
        "loss": 5.0 - step / 20 + shift,
        f"loss/{ce}": 3.0 - step / 40,
        f"loss/{kl}": None if step == 3 else 1.0 / step,
        f"loss/{mix}": 0.5,
        "grad_norm": 1.0,
        "seconds": 1.0 if step <= 20 else 3.0,
        "tokens_per_second": 1000.0,
        "peak_memory_bytes": 1e9,
        "phase/teacher": 0.5 if step <= 20 else 0.25,
        **({"phase/evaluate": 0.5} if step == 40 else {}),
        **(
            {f"gradient_norm/{ce}": 1.0, f"gradient_norm/{kl}": 0.1, f"gradient_cosine/{kl}": -0.25}
            if step % 10 == 1
            else {}
        ),
    }


def score_record(step, shift):
    return {
        "kind": "evaluate",
        "step": step,
        "consumed": 8 * step,
        "nll_per_byte": 2.0 + shift,
        "masked_accuracy": 0.25,
        "nll_per_byte/0.3": 1.9,
        "nll_per_byte/0.7": 2.1,
    }


def agreement_line(step, teacher):
    def row(kl):
        teacher_bins, student_bins = [0] * 20, [0] * 20
        teacher_bins[0], teacher_bins[19], student_bins[0] = 60, 40, 100
        return {
            "pairs": 100,
            "chunks": 100,
            "kl": kl,
            "top1": 0.5,
            "chunk_kl": kl / 10,
            "pushed_up": 0.4,
            "teacher_likelihoods": teacher_bins,
            "student_likelihoods": student_bins,
        }

    levels = [{"time": time} | row(1.5 - step / 40) for time in (0.3, 0.7)]
    whole = {"ids": 312, "temperature": 1.0} | row(1.5 - step / 40)
    sources = [{"source": name} | row(1.0) for name in ("books", "<web>")]
    teachers = {teacher: whole | {"by_time": levels, "by_source": sources}}
    return {"step": step, "consumed": 8 * step, "samples": 8, "times": [0.3, 0.7], "teachers": teachers}


def scores(shift):
    """Return what result.json says of twelve samples."""
    by_sample = [2.0 + shift * (1 + number % 3) + number / 10 for number in range(12)]
    return {
        "finished": True,
        "context": "block_diffusion",
        "samples": 12,
        "nll_per_byte": sum(by_sample) / 12,
        "masked_accuracy": 0.25,
        "total_seconds": 80.0,
        "total_starts": 1.0,
        "sample_ids": list(range(12)),
        "sample_nll_per_byte": by_sample,
    }


def read(folder) -> ReportedRun:
    """Read it as the only run of a report."""
    return read_run(folder, folder.name)
