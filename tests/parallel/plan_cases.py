"""A step of a run on real ranks, and the same step planned for each of them, told alike."""

import dataclasses

from tide_megatron.platform.lone_world import PlannedDevice

from tide_megatron.base.clock import Clock
from tide_megatron.base.device import choose_device
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.parallel.collectives import gather_objects
from tide_megatron.plan.one_rank import PlannedJob, adopt_models, adopt_states, model_bytes, models_of
from tide_megatron.plan.recorder import RecordedPhases, Recorder
from tide_megatron.plan.routing import Recorded, watch_routing
from tide_megatron.train.data import open_loader
from tide_megatron.train.models import ModelShape, read_plan
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import set_up
from tide_megatron.train.step import train_step


def by_phase_and_kind(recorded):
    """Return {(phase, kind): (calls, bytes)} of a recorder or a rank's record."""
    found = {}
    for sent, calls in recorded.calls.items():
        key = sent.phase, sent.kind
        before = found.get(key, (0, 0))
        found[key] = before[0] + calls, before[1] + recorded.num_bytes[sent]
    return found


def flops_by_phase(flops):
    """Return {phase: FLOPs} of all owners."""
    found = {}
    for label, number in flops.items():
        found[label.use] = found.get(label.use, 0) + number
    return found


def really(file, words):
    """Run two steps on this rank; return what it holds, sends and computes, and every rank's routing."""
    recipe, _ = load_recipe(file, words)
    parts = set_up(recipe, choose_device("cpu"))
    recorder = Recorder("cpu")
    phases = RecordedPhases(recorder)
    for part in (parts.run.head, *parts.run.teachers.values()):
        part.phases = phases
    run = dataclasses.replace(parts.run, phases=phases)
    routing = {}
    for name, model in models_of(run).items():
        routing |= watch_routing(model, name)
    adopt_models(run, recorder)
    given = run.read(parts.loader.update(0))
    with recorder:
        for step in range(2):
            recorder.begin()
            result = train_step(run, given, Clock(total_steps=3, step=step))
            adopt_states(run, recorder)
    assert result.update.applied
    return {
        "parameters": {name: model_bytes(model) for name, model in models_of(run).items()},
        "sent": by_phase_and_kind(recorder),
        "peaks": {name: peak.num_bytes for name, peak in recorder.peaks.items()},
        "flops": flops_by_phase(recorder.flops),
        "routing": gather_objects(routing),
    }


def planned_job(file, words, world, routing):
    """Plan the same two steps, in this process."""
    recipe, _ = load_recipe(file, words)
    choices = {"student": recipe.student, **recipe.teachers}
    plans = {name: read_plan(choice, name) for name, choice in choices.items()}
    tokenizer = plans["student"].tokenizer
    loaders = [
        open_loader(recipe, recipe.data.folders, tokenizer, plans, (rank, world), is_trained_on=True)
        for rank in range(world)
    ]
    shapes = {
        name: ModelShape(
            key=plan.key, choice=plan.choice, architecture=plan.architecture, mask_id=plan.mask_id
        )
        for name, plan in plans.items()
    }
    return PlannedJob(
        recipe=recipe,
        shapes=shapes,
        world=world,
        device=PlannedDevice.of("cpu"),
        reads=lambda rank: loaders[rank].update(0),
        noiser=Noiser(
            seed=recipe.seed,
            options=recipe.noise,
            whole_chunks_of=tuple(name for name in loaders[0].sides if name in recipe.teachers),
        ),
        routing=Recorded(by_rank=routing),
    )
