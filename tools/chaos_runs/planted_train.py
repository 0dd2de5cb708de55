"""`tide` whose ranks do themselves a harm when a file says so: what no signal brings about.

    TIDE_CHAOS_HARM=FILE python tools/chaos_runs/planted_train.py train run.yaml --ranks 2

FILE has JSON: `rank`, `what` (`teacher`: its last norm is filled with NaN and stays so; `gradient`: one
gradient of the student's is NaN), `updates` (of a gradient: how many). It is read before each step, and once
more it is gone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file runs as a command

import torch
import torch.distributed as dist

from tide_megatron import commands
from tide_megatron.train import loop

HARM = "TIDE_CHAOS_HARM"
_step = loop.train_step
_left = {"gradient": 0}


def harmed_step(run: Any, given: Any, clock: Any) -> Any:
    """Make a step as ever, after what the file says."""
    file = Path(os.environ[HARM])
    try:
        harm = json.loads(file.read_text())
    except FileNotFoundError:
        harm = {}
    if harm.get("rank") == dist.get_rank() and not harm.get("is_done"):
        if harm["what"] == "teacher":
            for teacher in run.teachers.values():
                with torch.no_grad():
                    teacher.model.decoder.final_layernorm.weight.fill_(float("nan"))
        _left["gradient"] = harm["updates"] if harm["what"] == "gradient" else 0
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(harm | {"is_done": True}))
        partial.rename(file)
    if not _left["gradient"]:
        return _step(run, given, clock)
    _left["gradient"] -= 1
    # Of a matrix megatron-core keeps the gradient from autograd.
    parameter = next(one for one in run.student.model.parameters() if one.dim() == 1)
    hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
    try:
        return _step(run, given, clock)
    finally:
        hook.remove()


loop.train_step = harmed_step  # in ranks, too: they import this file again

if __name__ == "__main__":
    commands.main()
