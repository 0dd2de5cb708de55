"""How far FP8 moves what a teacher says, and what a student is asked for: emulated on a CPU, by recipe.

    python tools/bench/precision.py --json            (the quickstart's pair and the golden models)
    python tools/bench/precision.py --samples 32      (fewer samples of the quickstart's test split)

Each teacher answers the same masked tokens in fp32 and in every other way of `WAYS`; the student does not
move. Golden models have random weights and no student, so one is drawn. Figures, means over masked tokens:

    logits      norm of the difference of centred logits over that of the logits
    top-1       share of tokens of which another id became the most likely
    divergence  KL(exact || moved) in nats
    likelihood  how far the log-likelihood of the gold token moves, nats (absolute)
    chunk       the same of runs of up to 4 masked tokens of a sample
    target      total variation between the targets of KL at temperature 2
    tidal       total variation between TIDAL's targets where teacher and student have half each
    loss        relative change of the KL term's value, signed
    slope       norm of the change of KL's gradient by the student's logits, over the gradient's
    batchmates  norm of the change of the centred logits of a sample that is read with others, over their own
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tide_megatron.platform

import numpy
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from tide_megatron.platform import start_distributed, stop_distributed

from bench.cost import machine
from tide_megatron.base.device import Device
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import View, trimmed_view
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.engine import Engine
from tide_megatron.models.precision import Fp8Options, Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, load_model, read_architecture
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.text.tokenizer import Tokenizer

QUICKSTART, GOLDENS = Path("examples/quickstart/models"), Path("tests/golden/data")
DATA = Path("runs/quickstart-data/test")
BLOCKS = Context(kind="block_diffusion", block_size=16)
CPU = Device(type="cpu", index=0, backend="gloo", threads=2)
TEMPERATURE, CHUNK, TIME = 2.0, 4, 0.5
WAYS: dict[str, tuple[str, Fp8Options | None]] = {
    "bf16": ("bf16", None),
    "rowwise": ("fp32", Fp8Options()),
    "blockwise": ("fp32", Fp8Options(recipe="blockwise")),
    "tensorwise": ("fp32", Fp8Options(recipe="tensorwise")),
    "rowwise, ends out": ("fp32", Fp8Options(first_layers=1, last_layers=1)),
    "rowwise, bf16": ("bf16", Fp8Options()),
}
"""Name -> precision of what is not quantised, and how matrices are held."""

Logits = Callable[[TideModel], Tensor]
"""Gives a model's logits [rows, ids] of one set of masked tokens."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A teacher with what it is asked."""

    folder: Path
    logits: Logits
    gold: Tensor
    """[rows] ids."""
    sample: Tensor
    """[rows]: which sample each is of, ascending."""
    alone: Logits | None
    """The logits of the first sample, read alone; None: it is not looked at."""
    student: Tensor | None
    """Its logits [rows, ids]; None: those of a fresh model of the teacher's kind."""


def build(folder: Path, way: str | None, *, fresh: bool = False) -> TideModel:
    """Build a teacher in one way, or in fp32, and load it, or draw its weights."""
    precision, fp8 = ("fp32", None) if way is None else WAYS[way]
    options = ModelOptions(
        device=CPU,
        precision=Precision(precision),
        fp8=fp8,
        engine=Engine(name="emulated" if fp8 else "local"),
    )
    model = build_model(read_architecture(folder), make_groups(Layout()), options)
    if fresh:
        draw_weights(model, 0)
    else:
        load_model(model, folder)
    return model


def answer(model: TideModel, view: View) -> Tensor:
    """Return the fp32 logits of a view's rows."""
    return model.rows(view).float() @ model.head_weight.float().t()


def quickstart(samples: int) -> list[Case]:
    """Ask both shipped teachers for masked tokens of the quickstart's test split."""
    tokenizer = Tokenizer.load(QUICKSTART / "student")
    loader = Loader(
        columns=PreparedData(DATA, tokenizer=tokenizer), samples=samples, block_size=BLOCKS.block_size
    )
    noiser = Noiser(seed=1)
    whole, first = (noiser.at(loader.batch_of(list(range(count))), TIME) for count in (samples, 1))

    def logits(noised: Noised) -> Logits:
        return lambda model: answer(model, trimmed_view(noised, BLOCKS, tokenizer.mask_id))

    student = logits(whole)(build(QUICKSTART / "student", None))
    gold, sample = whole.batch.ids[whole.row_index], whole.row_index[0]
    return [
        Case(QUICKSTART / name, logits(whole), gold, sample, logits(first), student)
        for name in ("teacher", "dense")
    ]


def goldens() -> list[Case]:
    """Ask every golden teacher for all tokens of its recorded samples, read both ways."""
    cases = []
    for folder in sorted(GOLDENS.glob("teacher_*")):
        recorded = numpy.load(folder / "io.npz")
        ids = torch.from_numpy(recorded["ids" if "ids" in recorded.files else "causal_ids"])
        samples, length = ids.shape
        view = View(
            ids=ids,
            positions=torch.arange(length).expand(samples, -1),
            context=Context(kind="bidirectional"),
            length=length,
            lengths=None,
            rows=torch.arange(ids.numel()),
        )
        first = dataclasses.replace(
            view, ids=ids[:1], positions=view.positions[:1], rows=torch.arange(length)
        )
        sample = torch.arange(samples).repeat_interleave(length)
        asked = [lambda model, view=one: answer(model, view) for one in (view, first)]
        cases.append(Case(folder, asked[0], ids.flatten(), sample, asked[1], None))
    return cases


def centred(logits: Tensor) -> Tensor:
    """Take away what a softmax does not see."""
    return logits - logits.mean(dim=-1, keepdim=True)


def share(change: Tensor, whole: Tensor) -> float:
    """Return the norm of a change over the norm of the whole."""
    return float(change.norm() / whole.norm())


def variation(one: Tensor, other: Tensor) -> float:
    """Return the mean total variation between softmaxes of logits."""
    return float((one.softmax(-1) - other.softmax(-1)).abs().sum(-1).mean() / 2)


def chunks(values: Tensor, sample: Tensor) -> Tensor:
    """Add up values of up to CHUNK rows of one sample at a time."""
    place = torch.arange(len(sample)) - torch.searchsorted(sample, sample)
    number = sample * len(sample) + place // CHUNK
    _, inverse = number.unique(return_inverse=True)
    return values.new_zeros(int(inverse.max()) + 1).index_add(0, inverse, values)


def figures(exact: Tensor, moved: Tensor, student: Tensor, case: Case) -> dict[str, float]:
    """Compare a teacher's exact and moved logits [rows, ids]; see the top of the file."""
    before, after = exact.log_softmax(-1), moved.log_softmax(-1)
    likely = (after - before).gather(1, case.gold[:, None]).squeeze(1)
    soft = [logits / TEMPERATURE for logits in (exact, moved, student)]
    targets = [logits.softmax(-1) for logits in soft]
    values = [
        float((target * (target.log() - soft[2].log_softmax(-1))).sum(-1).mean()) for target in targets[:2]
    ]
    return {
        "logits": share(centred(moved) - centred(exact), centred(exact)),
        "top-1": float((exact.argmax(-1) != moved.argmax(-1)).float().mean()),
        "divergence": float((before.exp() * (before - after)).sum(-1).mean()),
        "likelihood": float(likely.abs().mean()),
        "chunk": float(chunks(likely, case.sample).abs().mean()),
        "target": variation(soft[0], soft[1]),
        "tidal": variation((soft[0] + soft[2]) / 2, (soft[1] + soft[2]) / 2),
        "loss": values[1] / values[0] - 1,
        "slope": share(targets[1] - targets[0], targets[2] - targets[0]),
    }


@torch.no_grad()
def measure(case: Case) -> dict[str, dict[str, float]]:
    """Return the figures of every way, by its name."""
    exact = case.logits(build(case.folder, None))
    student = case.logits(build(case.folder, None, fresh=True)) if case.student is None else case.student
    found = {}
    layers = read_architecture(case.folder).layers
    for way, (_, fp8) in WAYS.items():
        if fp8 is not None and not any(fp8.quantizes(layer, layers) for layer in range(layers)):
            continue  # too few layers for it
        model = build(case.folder, way)
        moved = case.logits(model)
        found[way] = figures(exact, moved, student, case)
        if case.alone is not None:
            alone, together = case.alone(model), moved[case.sample == 0]
            found[way]["batchmates"] = share(centred(together) - centred(alone), centred(alone))
        print(
            case.folder.name,
            way,
            *(f"{name} {value:.2g}" for name, value in found[way].items()),
            file=sys.stderr,
        )
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Write the figures of one model in Markdown."""
    names = list(next(iter(found.values())))
    lines = [f"| | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    lines += [
        f"| {way} | {' | '.join(f'{value:.2g}' for value in row.values())} |" for way, row in found.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=64, help="of the quickstart's test split")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    start_distributed(CPU)
    with torch.no_grad():
        cases = [*(quickstart(given.samples) if DATA.is_dir() else []), *goldens()]
    if not DATA.is_dir():
        print(f"{DATA} is not there (python examples/quickstart/data.py makes it): golden models alone")
    results: dict[str, Any] = {case.folder.name: measure(case) for case in cases}
    stop_distributed()
    for name, found in results.items():
        print(f"\n{name}\n\n{table(found)}")
    if given.json:
        print(json.dumps({"models": results, "samples": given.samples, **machine()}))


if __name__ == "__main__":
    main()
