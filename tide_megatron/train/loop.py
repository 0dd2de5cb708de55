"""The loop owns time: it reads, steps, reports, evaluates, saves and stops; `step.py` owns tensors.

Every decision that changes what the ranks do next (a skipped update, a stop) is taken by all of them
together, after the same step. Left out: anything that chooses parts (`setup.py`).
"""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tide_megatron.base.clock import Clock
from tide_megatron.base.device import Device
from tide_megatron.base.heartbeat import HEARTBEAT
from tide_megatron.base.lease import Lease
from tide_megatron.base.log import Journal
from tide_megatron.base.startup import STARTUP
from tide_megatron.base.stop import StopFlag, Stopped
from tide_megatron.checkpoint.retention import TASK_SCORE
from tide_megatron.checkpoint.save import Saver
from tide_megatron.evaluate.likelihood import Likelihood, ModelScorer, evaluate
from tide_megatron.evaluate.model_folder import MODEL, write_context
from tide_megatron.models.weights import save_model
from tide_megatron.parallel.collectives import (
    all_agree,
    any_rank,
    barrier,
    broadcast_object,
    fail_together,
    held_by_first,
    is_first,
)
from tide_megatron.train.agreement import keep_agreement, measure_agreement
from tide_megatron.train.asking import ask_student
from tide_megatron.train.branch import KEY as BRANCH
from tide_megatron.train.cost import Devices
from tide_megatron.train.folder import (
    LOG,
    RESULT,
    claim_folder,
    finished_result,
    has_same_paths,
    held_folder,
    write_recipe,
    write_result,
    write_stopped,
)
from tide_megatron.train.guard import Guard
from tide_megatron.train.history import note_end, note_start, noting_faults
from tide_megatron.train.last_step import Deadline, LastStep, lost_steps
from tide_megatron.train.metrics import Metrics, report_step
from tide_megatron.train.preflight import compare_ranks, measure_ranks
from tide_megatron.train.preflight_report import Preflight, write_preflight
from tide_megatron.train.profile import Profiler
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import Tree
from tide_megatron.train.sanity import check_student, check_teachers
from tide_megatron.train.saving import Costs, go_back, make_saver, note_score, start_or_resume
from tide_megatron.train.setup import Setup, set_up
from tide_megatron.train.startup import FirstUpdate
from tide_megatron.train.status import write_status
from tide_megatron.train.step import train_step
from tide_megatron.train.step_input import Ahead

log = logging.getLogger(__name__)


def train(recipe: Recipe, tree: Tree, resume: bool, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Run a recipe to its end on this rank; a rank function for `launch.run_ranks`. All ranks call it.

    Args:
        recipe: the validated recipe.
        tree: its resolved values.
        resume: go on from the run folder's latest checkpoint; False discards it.
        device: where to compute.
        stop: when it is raised, the run saves after the step it is in and returns; before the first step
            it ends where it is.

    Returns:
        Held-out scores and costs (also in result.json); the same on every rank. `finished` is false for a run
        that was stopped: stopped.json is in the run folder.

    Raises:
        Stopped: before the first step; the run folder is as it was.
    """
    folder = Path(recipe.folder)
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(contextlib.closing(Journal())) if is_first() else None
        with stop.ending():  # nothing is written yet, and nothing of an earlier run discarded
            with STARTUP("run folder"):
                lease = stack.enter_context(
                    held_by_first(lambda: held_folder(folder, tree, resume=resume, stop=stop))
                )
            with STARTUP("preflight"):
                compared = compare_ranks(recipe, tree, device, resume=resume)
            if resume and (done := _finished(folder, tree, before_reading=True)):
                return done
            log.info("device: %s", ", ".join(f"{name} {value}" for name, value in device.facts().items()))
            setup = set_up(recipe, device)
            with STARTUP("checks"):
                check_student(recipe, setup)
                sanity = check_teachers(recipe, setup)
            with STARTUP("resume"):
                clock = start_or_resume(recipe, tree, setup, resume=resume)
            if resume and (done := _finished(folder, tree, before_reading=False)):
                return done
            with STARTUP("preflight"):
                preflight = measure_ranks(recipe, setup, device, compared)
            saver = make_saver(recipe, tree, setup, lease)
        with stop.finishing("the run ends after its step under way, and saves it", is_last=True):
            _begin_together(stop)
            _claim(folder, tree, resume, journal, clock, preflight)
            with (
                noting_faults(folder if is_first() else None),
                _open_metrics(recipe, tree, setup, clock, device) as metrics,
            ):
                result = _step_and_score(recipe, setup, saver, clock, metrics, stop) | {"teachers": sanity}
                HEARTBEAT.rest()
                if result["finished"]:
                    _write_student(recipe, setup, result, lease)
            if is_first():
                _tell_end(folder, result, stop)
    return result


def _claim(
    folder: Path, tree: Tree, resume: bool, journal: Journal | None, clock: Clock, preflight: Preflight
) -> None:
    """Take the run folder, whose checkpoint has been compared, and begin its log. All ranks call it."""
    with fail_together():
        if is_first():
            lost = lost_steps(folder, clock) if resume else None
            claim_folder(folder, tree, resume=resume)
            write_recipe(folder, tree)
            write_preflight(folder, preflight)
            note_start(folder, clock, lost, dist.get_world_size())
    if journal is not None:
        journal.open(folder / LOG)


def _tell_end(folder: Path, result: dict[str, Any], stop: StopFlag) -> None:
    """Write down how the run ended, in order (only the first rank calls it)."""
    step, why = result["clock"]["step"], stop.reason or "another rank"
    if not result["finished"]:
        write_stopped(folder, result["clock"], why)
    note_end(folder, "finished" if result["finished"] else "stopped", "" if result["finished"] else why, step)
    with contextlib.suppress(OSError):
        write_status(folder)


def _begin_together(stop: StopFlag) -> None:
    """Begin on all ranks or on none: from here on a request is answered between steps. All ranks call it.

    Raises:
        Stopped: on every rank that still can, when any of them was asked to stop until now.
    """
    try:
        is_begun = all_agree(stop.reason is None)
    except RuntimeError:
        if stop.reason is None:
            raise
        is_begun = False  # a rank that was asked too ended before it came here
    if not is_begun:
        raise Stopped(f"stopped by {stop.reason or 'another rank'}")


def _open_metrics(recipe: Recipe, tree: Tree, setup: Setup, clock: Clock, device: Device) -> Metrics:
    """Open what the run reports to. All ranks call it."""
    dtype = setup.run.student.model.config.params_dtype
    told = recipe.metrics.peak_tflops
    return Metrics(
        recipe.metrics,
        Path(recipe.folder),
        clock,
        phases=setup.run.phases,
        devices=Devices.of(device, dtype, dist.get_world_size(), told_tflops=told),
        recipe=tree if is_first() else None,
    )


def _step_and_score(
    recipe: Recipe, setup: Setup, saver: Saver, clock: Clock, metrics: Metrics, stop: StopFlag
) -> dict[str, Any]:
    """Train and, unless the run was stopped, score the student; return what result.json tells of it."""
    if recipe.evaluation.at_start and not clock.consumed:
        with STARTUP("evaluation"):
            _evaluate(recipe, setup, clock, metrics)
            ask_student(recipe, setup, clock, metrics)
    costs = Costs(setup.spent)
    folder = Path(recipe.folder)
    with (
        Profiler(recipe.metrics.profile, folder, setup.run.device) as profiler,
        LastStep(folder, clock, is_kept=is_first()) as last,
        Ahead(lambda at: setup.run.read(setup.loader.update(at)), setup.loader.update_samples) as ahead,
    ):
        clock, stopped = _loop(recipe, setup, saver, clock, metrics, stop, costs, profiler, last, ahead)
    result = {
        "clock": {"step": clock.step, "consumed": clock.consumed, "skipped": clock.skipped},
        **costs.own(),
        **{f"total_{name}": value for name, value in costs.total().items()},
        **({"branch": setup.contents[BRANCH]} if BRANCH in setup.contents else {}),
        "finished": not stopped,
    }
    if stopped:
        return result
    scores = _evaluate(recipe, setup, clock, metrics)
    tasks = ask_student(recipe, setup, clock, metrics)
    note_score(recipe, clock, _held_out(scores) | tasks)
    own = {"tasks": {name.removeprefix(TASK_SCORE): score for name, score in tasks.items()}} if tasks else {}
    return result | own | ({} if scores is None else scores.summary())


def _write_student(recipe: Recipe, setup: Setup, result: dict[str, Any], lease: Lease | None) -> None:
    """Write the trained student and result.json into the run folder. All ranks call it.

    Args:
        recipe: the run.
        setup: its parts.
        result: for result.json.
        lease: on the run folder, on the first rank.
    """
    folder = Path(recipe.folder)
    with fail_together():
        if lease is not None:
            lease.check()
    save_model(setup.run.student.model, folder / MODEL)
    barrier()
    if is_first():
        setup.tokenizer.save(folder / MODEL)
        write_context(folder / MODEL, recipe.student.context)
        write_result(folder, result)
        log.info("the student is in %s", folder / MODEL)


def _finished(folder: Path, tree: Tree, *, before_reading: bool) -> dict[str, Any] | None:
    """Return the result of a run that has ended already, else None. All ranks call it.

    Args:
        folder: the run folder, checked or claimed.
        tree: the resolved recipe.
        before_reading: what lies in the recipe's folders has not been compared yet, so the paths must be the
            same; a run whose folders were moved is asked again after that.
    """
    with fail_together():
        done = finished_result(folder, tree) if is_first() else None
        if before_reading and done is not None and not has_same_paths(folder, tree):
            done = None
    done = broadcast_object(done)
    if done is not None:
        log.info(
            "%s: already finished at step %d: scores in %s, the student in %s; raise steps= to go on, give "
            "--fresh to start over, or score it again with tide evaluate",
            folder,
            done["clock"]["step"],
            folder / RESULT,
            folder / MODEL,
        )
    return done


def _loop(
    recipe: Recipe,
    setup: Setup,
    saver: Saver,
    clock: Clock,
    metrics: Metrics,
    stop: StopFlag,
    costs: Costs,
    profiler: Profiler,
    last: LastStep,
    ahead: Ahead,
) -> tuple[Clock, bool]:
    """Step until the end or until somebody asks to stop; return the clock and whether it was stopped."""
    run, every, guard = setup.run, recipe.checkpoints.every, Guard(recipe.guard)
    saved, stopped, first = clock.consumed or -1, False, FirstUpdate(Path(recipe.folder))
    deadline = Deadline(stop, lambda: [save.seconds for save in saver.times])
    while clock.step < clock.total_steps and not stopped:
        before = clock
        with run.phases("checkpoint"):
            saver.before_step(clock)
        profiler.before(clock)
        with run.phases("data"):
            given = ahead.take(clock.consumed, is_last=clock.step + 1 == clock.total_steps)
        is_measured = _is_measured(recipe.metrics.gradients_every, clock)
        result = train_step(run, given, clock, measures_terms=is_measured)
        update = result.update
        clock = clock.after_step(applied=update.applied, samples=setup.loader.update_samples)
        last.note(clock)
        first.done()
        HEARTBEAT.update()
        profiler.after(clock)
        report_step(metrics, recipe, setup.loader, result, before, clock)
        is_lost = guard.after_step(before, result.objective, update.grad_norm, applied=update.applied)
        deadline.after_step()
        stopped, is_lost = any_rank(stop.requested, is_lost)
        is_best = False
        if is_lost and not stopped:
            clock = _back(recipe, setup, saver, guard, clock, costs)
            saved = clock.consumed
        elif update.applied and not stopped:
            is_best = note_score(recipe, clock, _scored(recipe, setup, clock, metrics))
            if is_best or (every and clock.step % every == 0):
                with run.phases("checkpoint"):
                    saver.begin(clock, result.terms, costs.total())
                saved = clock.consumed
    with run.phases("checkpoint"):
        if saved != clock.consumed:
            saver.begin(clock, {}, costs.total())
        saver.wait()
    if stopped:
        log.warning(
            "stopped by %s at step %d; the same command goes on", stop.reason or "another rank", clock.step
        )
    return clock, stopped


def _scored(recipe: Recipe, setup: Setup, clock: Clock, metrics: Metrics) -> dict[str, float]:
    """Take the scores that are due after an update; none: nothing is. All ranks call it together."""
    found: dict[str, float] = {}
    if _is_scored(recipe.evaluation.every, clock):
        found |= _held_out(_evaluate(recipe, setup, clock, metrics))
    if _is_scored(recipe.evaluation.task_every, clock):
        found |= ask_student(recipe, setup, clock, metrics)
    return found


def _held_out(scores: Likelihood | None) -> dict[str, float]:
    if scores is None:
        return {}
    return {"nll_per_byte": scores.nll_per_byte, "masked_accuracy": scores.masked_accuracy}


def _is_scored(every: int, clock: Clock) -> bool:
    """Say whether scores are due after an update; after the last one they are taken anyway."""
    return every > 0 and clock.step % every == 0 < clock.total_steps - clock.step


def _is_measured(every: int, clock: Clock) -> bool:
    """Say whether the terms' gradients are measured in the update before which the clock stands."""
    return every > 0 and (clock.step + clock.skipped) % every == 0


def _back(recipe: Recipe, setup: Setup, saver: Saver, guard: Guard, clock: Clock, costs: Costs) -> Clock:
    """Go back to a checkpoint, and save there at once: a restart must not stumble over the same samples."""
    with setup.run.phases("checkpoint"):
        saver.wait()
        clock = go_back(recipe, guard, clock, setup.run.student)
        saver.begin(clock, {}, costs.total())
    return clock


def _evaluate(recipe: Recipe, setup: Setup, clock: Clock, metrics: Metrics) -> Likelihood | None:
    """Score the student on held-out data, if there is any. All ranks call it."""
    if setup.held_out is None:
        return None
    student = setup.run.student
    scorer = ModelScorer(
        model=student.model,
        context=student.context,
        mask_id=student.mask_id,
        calibration=recipe.evaluation.calibration,
    )
    with setup.run.phases("evaluate"):
        student.model.eval()
        scores = evaluate(scorer, student.context, setup.held_out, recipe.evaluation, setup.run.device)
        student.model.train()
    values = _held_out(scores)
    assert all(map(math.isfinite, values.values())), "a score is a finite number"
    for level in scores.by_time():
        values |= {f"{name}/{level['time']:g}": level[name] for name in tuple(values) if "/" not in name}
    sources = scores.by_source()
    for own in sources if len(sources) > 1 else ():
        values |= {f"{name}/{own['source']}": own[name] for name in tuple(values) if "/" not in name}
    if recipe.evaluation.agreement:
        values |= _agreement(recipe, setup, clock)
    metrics.evaluated(clock, values)
    return scores


def _agreement(recipe: Recipe, setup: Setup, clock: Clock) -> dict[str, float]:
    """Compare the student with its teachers, and keep the figures. All ranks call it.

    Returns:
        What is reported of them; nothing without teachers that read the held-out data.
    """
    with setup.run.phases("evaluate"):
        found = measure_agreement(setup, recipe.evaluation)
    if found is None:
        return {}
    with fail_together():
        if is_first():
            keep_agreement(Path(recipe.folder), clock, found.values())
    return found.metrics()
