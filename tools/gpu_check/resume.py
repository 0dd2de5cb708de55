"""Saves while training goes on, and a resume in a new process, in torch's deterministic mode: equal bits.

What is not deterministic outside that mode is measured, not looked up: every operator of a step is called
again with the same inputs, and its answers are compared bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gpu_check.recorded import load_run
from gpu_check.rows import NotMeasured, Place, Row, fresh_processes, judged
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.train.loop import train
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import Tree
from tide_megatron.train.setup import set_up
from tide_megatron.train.step import train_step

STEPS, STOP, EVERY = 6, 3, 2
WORDS = (
    f"steps={STEPS}",
    f"checkpoints.every={EVERY}",
    "optimizer.name=adamw",
    "optimizer.distributed=true",
    "optimizer.clip_norm=1.0",
)
FEWER = ("batch.samples=4", "batch.microbatch=4")
"""In a rehearsal."""
REPEATS = 3
DRAWN = ("empty", "new_empty", "rand", "normal", "uniform")
"""Operators whose answers are arbitrary, or drawn: they are not compared."""
WITHOUT = " does not have a deterministic implementation"
"""What torch says behind the name of an operator that has no deterministic form."""
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""torch's deterministic mode wants it, before CUDA starts."""


def check_resume(place: Place) -> list[Row]:
    """Hold a run that was stopped, and gone on with in a new process, to one that was not."""
    whole = _apart(place, "whole", STEPS)
    _apart(place, "stopped", STOP)
    resumed = _apart(place, "stopped", STEPS)
    faults = []
    if len(whole["lines"]) != STEPS or whole["lines"] != resumed["lines"]:
        faults.append(f"losses or norms differ: {_first_difference(whole['lines'], resumed['lines'])}")
    differing = [name for name, digest in whole["weights"].items() if resumed["weights"].get(name) != digest]
    if differing:
        faults.append(f"{len(differing)} of {len(whole['weights'])} tensors differ, first {differing[0]}")
    unruly = sorted({*whole["warnings"], *resumed["warnings"]})
    stall = max(whole["stalls"])
    row = judged(
        "resume",
        f"stopped at {STOP} of {STEPS} and gone on with in a new process, saves every {EVERY} steps: losses, "
        f"norms and weights of an undisturbed run; training waited {stall:.3f} s a save at most",
        faults,
        stall_seconds=whole["stalls"],
        no_deterministic_form=unruly,
        step_seconds=whole["step_seconds"],
    )
    return [row, _operators(place)]


def _operators(place: Place) -> Row:
    """Name the operators whose answers change from call to call."""
    found = _apart(place, "operators", 1)
    names = ", ".join(found["changing"]) or "none"
    seen = f"of {found['seen']} operators of a step, each called {REPEATS} times alike"
    text = f"{seen}, these change their answers: {names}"
    return Row(check="determinism", text=text, figures=found)


def _apart(place: Place, name: str, until: int) -> Any:
    """Run `train_until` (or `repeat_operators`) in a new process and return its value."""
    answer = place.scratch / f"{name}-{until}.json"
    process = fresh_processes(place).Process(target=_work, args=(place, name, until, answer))
    process.start()
    process.join()
    if not answer.exists():
        raise NotMeasured(f"{name}, to step {until}: the process ended with {process.exitcode} (see the log)")
    return json.loads(answer.read_text())


def _work(place: Place, name: str, until: int, answer: Path) -> None:
    """Do one run in this fresh process and write its answer."""
    os.environ.update(CUBLAS)
    try:
        found = _found(place, name, until)
        answer.write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _found(place: Place, name: str, until: int) -> dict[str, Any]:
    words = (*WORDS, *(FEWER if place.is_rehearsal else ()))
    recipe, tree = load_run("shared", place, *words, f"folder={place.scratch / name}")
    if name == "operators":
        return run_ranks(repeat_operators, (recipe,), 1, place.device)  # type: ignore[no-any-return]
    return run_ranks(train_until, (recipe, tree, until), 1, place.device)  # type: ignore[no-any-return]


class StopAfter(StopFlag):
    """Asks for a stop when it was polled so often: training polls once after each step."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self._left = polls

    @property
    def requested(self) -> bool:
        """Count one poll; say whether it was the last one."""
        self._left -= 1
        return self._left <= 0


def train_until(recipe: Recipe, tree: Tree, until: int, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Train up to some step in torch's deterministic mode, as a stop signal would end it; a rank function.

    Returns:
        `lines`: (loss, gradient norm) by step; `weights`: digests of the final model's tensors; `stalls`:
        seconds that training waited for each save; `warnings`: operators without a deterministic form.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(recipe, tree, True, device=device, stop=stop if until >= recipe.steps else StopAfter(until))
    folder = Path(recipe.folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    sentences = [str(one.message).partition(WITHOUT) for one in said]
    return {
        "lines": [(step["loss"], step["grad_norm"]) for step in steps],
        "step_seconds": [step["seconds_per_step"] for step in steps],
        "weights": _digests(folder / "model"),
        "stalls": [step.get("phase/checkpoint", 0.0) * step["seconds"] for step in steps],
        "warnings": sorted({name for name, found, _ in sentences if found}),
    }


def _digests(model: Path) -> dict[str, str]:
    """Return the digest of every tensor of a model folder; none where a stopped run wrote no model."""
    tensors = load_file(model / "model.safetensors") if (model / "model.safetensors").exists() else {}
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def _first_difference(whole: list[Any], resumed: list[Any]) -> str:
    """Say where two runs part."""
    for step, (one, other) in enumerate(zip(whole, resumed, strict=False), start=1):
        if one != other:
            return f"step {step}: {one} and {other}"
    return f"{len(whole)} and {len(resumed)} steps"


class Repeat(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls every operator of torch's several times; one that writes into its arguments gets copies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()
        self.changing: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compare the answers, then make the call itself."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and not name.startswith(DRAWN):
            self.seen.add(name)
            first, *others = (self._answer(func, args, kwargs) for _ in range(REPEATS))
            if any(not _same(first, other) for other in others):
                self.changing.add(name)
        return func(*args, **kwargs)

    @staticmethod
    def _answer(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """Return what a call gives, and what it leaves in its arguments."""
        if not func._schema.is_mutable:
            return _tensors(func(*args, **kwargs))
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        return _tensors((func(*args, **kwargs), args, kwargs))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


def repeat_operators(recipe: Recipe, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Make one training step and call each of its operators again; a rank function.

    Returns:
        `seen`: how many operators were called; `changing`: those whose answers differed, sorted. Compiled
        kernels (FlexAttention, fused elementwise parts) and collectives are not seen.
    """
    parts = set_up(recipe, device)
    with Repeat() as repeat:
        train_step(parts.run, parts.run.read(parts.loader.update(0)), Clock(total_steps=recipe.steps))
    return {"seen": len(repeat.seen), "changing": sorted(repeat.changing)}
