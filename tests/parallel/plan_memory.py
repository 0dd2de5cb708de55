"""Print, as JSON, what a step on a CPU holds at most by phase: resident, counted by torch's tensors, planned.

Run as a program of its own: `MALLOC_MMAP_THRESHOLD_=65536 python tests/parallel/plan_memory.py RUN.yaml`, so
that what is freed goes back to the system. All in bytes above what the process held before it had models.
"""

import contextlib
import gc
import json
import sys
from pathlib import Path

import tide_megatron.platform
from tide_megatron.platform import start_distributed, stop_distributed

from tide_megatron.base.clock import Clock
from tide_megatron.base.device import Device
from tide_megatron.head.loss import HeadLoss
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.vocab_group import make_vocab_group
from tide_megatron.plan.job import make_job, read_shapes
from tide_megatron.plan.one_rank import models_of, record_rank
from tide_megatron.plan.recorder import RecordedPhases, Recorder
from tide_megatron.train.models import build_student, build_teacher
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.step import Run, train_step

CPU = Device(type="cpu", index=0, backend="gloo", threads=1)


def status(word):
    """Return a number of bytes of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(word))


class ResidentPhases(RecordedPhases):
    """Notes the most that was resident in each phase."""

    def __init__(self, recorder):
        super().__init__(recorder)
        self.most = {}

    @contextlib.contextmanager
    def __call__(self, name):
        with super().__call__(name):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            yield
            self.most[name] = max(self.most.get(name, 0), status("VmHWM"))


def really(job):
    """Build a run of one rank with random weights, make two steps; return (resident, counted) by phase."""
    start_distributed(CPU)
    gc.collect()
    before = status("VmRSS")
    recorder = Recorder("cpu")
    phases = ResidentPhases(recorder)
    recipe, shapes = job.recipe, job.shapes
    with recorder:
        group = make_vocab_group([shape.architecture.vocabulary for shape in shapes.values()], 1)
        student = build_student(recipe, shapes["student"], CPU)
        teachers = {
            name: build_teacher(recipe, name, shapes[name], CPU, group, phases) for name in recipe.teachers
        }
        head = HeadLoss(recipe.terms, group, recipe.head, phases=phases)
        run = Run(
            student=student,
            teachers=teachers,
            head=head,
            noiser=job.noiser,
            phases=phases,
            device=CPU.torch_device,
        )
        for model in models_of(run).values():
            draw_weights(model, 1)
        student.optimizer.reload_model_params()
        given = run.read(job.reads(0))
        for step in range(2):
            recorder.begin()
            phases.most.clear()
            train_step(run, given, Clock(total_steps=3, step=step))
    counted = {name: peak.num_bytes for name, peak in recorder.peaks.items()}
    stop_distributed()
    return {name: most - before for name, most in phases.most.items()}, counted


def main():
    """Measure and print."""
    file, *words = sys.argv[1:]
    recipe, _ = load_recipe(Path(file), words)
    shapes = read_shapes(recipe)
    job = make_job(recipe, shapes, world=1, length=recipe.data.fixed_length, kind="cpu")
    planned = {name: peak.num_bytes for name, peak in record_rank(job, 0).peaks.items()}
    resident, counted = really(job)
    print(json.dumps({"planned": planned, "resident": resident, "counted": counted}))


if __name__ == "__main__":
    main()
