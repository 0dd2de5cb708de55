"""What travels in one step, by kind, against what a formula says and against shipping logits.

    python tools/bench/exchange_bytes.py             (the paper's shapes, 4 ranks, bf16)
    python tools/bench/exchange_bytes.py --small     (the same layouts at toy sizes: seconds)

One student (hidden 1,024, vocabulary 151,936) and both teachers of the paper with random weights and one
layer a stage: LLaDA2-mini's head (2,048 x 157,184) with experts over 4 ranks, WeDLM's (4,096 x 151,936) cut
TP2xPP2. A real step is run, the ledger is read, and held against arithmetic that is written here from the
design, not from the code. The baseline ships each hidden row's logits of both teachers once, from the
teacher's ranks to the student's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch
import torch.distributed as dist

from tide_megatron.base.clock import Clock
from tide_megatron.base.device import Device
from tide_megatron.base.phases import Phases
from tide_megatron.base.stop import StopFlag
from tide_megatron.diffusion.batch import IGNORED, Batch
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.head.loss import HeadLoss
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.losses.calm import ReverseCalm
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.tidal import Tidal
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.vocab_group import VocabGroup, make_across, make_vocab_group
from tide_megatron.teachers.exchange import Route, num_rows
from tide_megatron.teachers.teacher import Teacher, ViewBuilder
from tide_megatron.train.recipe import Optimizer
from tide_megatron.train.step import Run, train_step
from tide_megatron.train.student import Student

RANKS = 4
BODY = {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6}
STUDENT = BODY | {"model_type": "a2d-qwen3", "tie_word_embeddings": True, "num_hidden_layers": 1}
DENSE = BODY | {"model_type": "wedlm", "num_hidden_layers": 2}
MIXTURE = BODY | {
    "model_type": "llada2_moe",
    "partial_rotary_factor": 1.0,
    "num_hidden_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_shared_experts": 1,
}
CONTEXT = Context(kind="block_diffusion", block_size=32)
MASK = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of one measurement: (hidden, vocabulary) of each model, and of the data."""

    student: tuple[int, int] = (1024, 151_936)
    dense: tuple[int, int] = (4096, 151_936)
    mixture: tuple[int, int] = (2048, 157_184)
    samples: int = 1
    length: int = 256
    accumulation: int = 2
    bytes_per_number: int = 2


SMALL = Shapes(student=(32, 320), dense=(64, 320), mixture=(48, 333), length=64, bytes_per_number=4)


def measure(shapes: Shapes, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Run one step on this rank; return bytes of all ranks by kind, counted, by formula, and of logits."""
    run = make_run(shapes, device)
    batches = [
        batch_of(shapes, dist.get_rank() * shapes.accumulation + k) for k in range(shapes.accumulation)
    ]
    expected = Formula(run, batches, shapes).bytes()
    result = train_step(run, run.read(batches), Clock(total_steps=10))
    assert result.update.applied, "the step was skipped"
    logits = result.masked * (shapes.dense[1] + shapes.mixture[1]) * shapes.bytes_per_number
    return {"counted": result.bytes, "formula": expected, "logits": logits, "rows": result.masked}


def make_run(shapes: Shapes, device: Device) -> Run:
    """Build student and teachers in their layouts, with random weights."""
    group = make_vocab_group([size for _, size in (shapes.student, shapes.dense, shapes.mixture)], RANKS)
    student = _model(STUDENT, shapes.student, Layout(), shapes, device, trainable=True)
    optimizer = Optimizer(name="sgd", learning_rate=1e-3, distributed=False)
    phases = Phases(device.torch_device)
    return Run(
        student=Student(student, CONTEXT, MASK, optimizer),
        teachers={
            name: _teacher(name, config, of, layout, (shapes, device, group), phases)
            for name, config, of, layout in (
                ("dense", DENSE, shapes.dense, Layout(tensor=2, pipeline=2)),
                ("mixture", MIXTURE, shapes.mixture, Layout(expert=4)),
            )
        },
        head=HeadLoss(
            {
                "ce": CrossEntropy(),
                "tidal": Tidal(teacher="dense"),
                "reverse_calm": ReverseCalm(teacher="mixture"),
            },
            group,
            phases=phases,
        ),
        noiser=Noiser(seed=1),
        phases=phases,
        device=device.torch_device,
    )


def _teacher(
    name: str,
    config: dict[str, Any],
    size: tuple[int, int],
    layout: Layout,
    where: tuple[Shapes, Device, VocabGroup],
    phases: Phases,
) -> Teacher:
    shapes, device, group = where
    model = _model(config, size, layout, shapes, device, head=group.columns(size[1]))
    route = Route(
        layout=layout, replica=model.groups.mp, across=make_across(layout, group.size), rank=group.rank
    )
    view_builder = ViewBuilder(context=CONTEXT, mask_id=MASK)
    return Teacher(name, model, view_builder, route, shared_schedule=2, phases=phases)


@torch.no_grad()
def _model(
    config: dict[str, Any],
    size: tuple[int, int],
    layout: Layout,
    shapes: Shapes,
    device: Device,
    **options: Any,
) -> TideModel:
    """Build a model whose weights are small random numbers, the same on every rank."""
    hidden, vocabulary = size
    architecture = ARCHITECTURES[config["model_type"]].from_hf(
        config | {"hidden_size": hidden, "vocab_size": vocabulary, "intermediate_size": 64}
    )
    layout.check(
        RANKS, heads=architecture.heads, groups=architecture.query_groups, layers=architecture.layers
    )
    precision = Precision("bf16" if shapes.bytes_per_number == 2 else "fp32")
    model = build_model(
        architecture,
        make_groups(layout),
        ModelOptions(device=device, layout=layout, precision=precision, **options),
    )
    generator = torch.Generator(device.torch_device).manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.02, generator=generator)
    return model


def batch_of(shapes: Shapes, number: int) -> Batch:
    """Make a microbatch of random tokens; every other rank's are shorter, so that rows are uneven."""
    shape = (shapes.samples, shapes.length)
    ids = torch.randint(2, shapes.student[1], shape, generator=torch.Generator().manual_seed(number))
    labels = ids.clone()
    labels[:, : 8 + 16 * (number % 3)] = IGNORED
    sample = torch.arange(shapes.samples) + number * shapes.samples
    return Batch(sample_ids=sample, epochs=sample * 0, ids=ids, labels=labels, reply_bytes=sample + 1)


class Formula:
    """Bytes that arrive at all ranks together, by kind, written from the design."""

    def __init__(self, run: Run, batches: list[Batch], shapes: Shapes) -> None:
        """Learn the sizes of all ranks' rows and views, by noising every rank's batches here."""
        self.shapes = shapes
        ranks = range(RANKS)
        count = shapes.accumulation
        noised = [[run.noiser(batch_of(shapes, rank * count + k)) for k in range(count)] for rank in ranks]
        self.rows = [[int(example.masked.sum()) for example in mine] for mine in noised]
        requests = [run.teachers["dense"].request(mine) for mine in noised]
        self.views = [request.sizes(request.numbers()) for request in requests]
        asked = [[num_rows(passes) for passes in mine] for mine in self.views]
        assert asked == self.rows, "teachers with the student's tokens are asked about its rows"

    def bytes(self) -> dict[str, int]:
        """Return every kind."""
        return {
            "collect": self._collect(),
            "deliver": self._deliver(),
            "rows": self._rows() + self._gathered(self.shapes.student[0], self.shapes.bytes_per_number),
            "statistics": self._statistics(),
            "gradients": self._gathered(self.shapes.student[0], bytes_per_number=4),
        }

    def _collect(self) -> int:
        """Dense: each seat's views (two parts of ids, rows) as int32, padded to the longest seat's."""
        numbers = [
            sum(size.samples * 2 * size.length + size.rows for passes in seat for size in passes)
            for seat in self.views
        ]
        return RANKS * (RANKS - 1) * _up(max(numbers)) * 4

    def _deliver(self) -> int:
        """Dense: its one replica broadcasts all rows to 3 ranks. Mixture: 4 replicas gather padded parts."""
        total = 0
        for k in range(self.shapes.accumulation):
            rows = [mine[k] for mine in self.rows]
            total += (RANKS - 1) * sum(rows) * self.shapes.dense[0]
            total += RANKS * (RANKS - 1) * _up(max(rows)) * self.shapes.mixture[0]
        return total * self.shapes.bytes_per_number

    def _rows(self) -> int:
        """Describe rows: gold and sample of each, noise level and maskable count of a sample, as int64."""
        packed = [sum(2 * rows + 2 * self.shapes.samples for rows in mine) for mine in self.rows]
        return RANKS * (RANKS - 1) * _up(max(packed)) * 8

    def _gathered(self, width: int, bytes_per_number: int) -> int:
        """Hidden rows of the student there, their gradients in fp32 back: padded parts each way."""
        longest = [max(mine[k] for mine in self.rows) for k in range(self.shapes.accumulation)]
        return RANKS * (RANKS - 1) * sum(map(_up, longest)) * width * bytes_per_number

    def _statistics(self) -> int:
        """One slab, fp32, none back: 3 numbers a row of student and mixture, 4 a pair of TIDAL."""
        rows = [sum(mine[k] for mine in self.rows) for k in range(self.shapes.accumulation)]
        return RANKS * (RANKS - 1) * sum(_up((3 + 3 + 4) * number) for number in rows) * 4


def _up(number: int, multiple: int = 8) -> int:
    """Round a transported length up."""
    return -(-number // multiple) * multiple


def main() -> None:
    """Measure on 4 ranks and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = run_ranks(measure, (SMALL if given.small else Shapes(),), RANKS, given.device)
    found["share_of_logits"] = sum(found["counted"].values()) / found["logits"]
    found["equal"] = found["counted"] == found["formula"]
    if given.json:
        print(json.dumps(found))
        return
    print(f"{'kind':12}{'counted':>14}{'formula':>14}")
    for kind, counted in found["counted"].items():
        print(f"{kind:12}{counted:14,}{found['formula'][kind]:14,}")
    print(
        f"{found['rows']} hidden rows; all kinds are {found['share_of_logits']:.1%} of shipping logits once"
    )


if __name__ == "__main__":
    main()
