"""Replays of the recorded sampler: transfer counts, one commit, and whole batches under `reference`.

A batch is decoded by the package's own loop on the recorded student, with the cache and without it. Every
token must be the recorded one, and so must the step at which it was committed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from goldens.models import one_rank_world
from goldens.row import Case, Golden, Row
from tide_megatron.base.device import Device
from tide_megatron.decode.canvas import Canvas, Rules
from tide_megatron.decode.denoise import denoise
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.passes import Fed, pass_mask
from tide_megatron.decode.schedule import Picks, choose
from tide_megatron.diffusion.denoise import transfer_counts
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.schedule import SCHEDULES
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import load_model, read_architecture
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

STUDENT = "student_a2d_qwen3"


def replay_sampler(path: Path) -> list[Row]:
    """Replay sampler.npz; whole batches only where the student stands beside it."""
    golden = Golden(path)
    for name, schedule in SCHEDULES.items():
        ours = {}
        for key in golden.keys(rf"ntt_{name}_L\d+_s\d+"):
            length, steps = map(int, re.findall(r"\d+", key))
            ours[key] = transfer_counts(schedule, [length, length - length // 2], steps)
        golden.compare(f"ntt_{name}_*", ours, tolerance=0.0)
    golden.compare("step_*", {"step_out": _one_step(golden)}, tolerance=0.0)
    if not (path.parent / STUDENT / "model.safetensors").is_file():
        whole = golden.keys(r".*_(seq|hist|hist_len)|prompt[0-9]+|(mask|pad|eos)_id|prep_(x|attn|pos)")
        golden.cases()
        golden.leave_out("whole batches", whole, f"this folder has no {STUDENT}/model.safetensors")
        return golden.rows()
    with one_rank_world():
        folder = path.parent / STUDENT
        options = ModelOptions(device=Device(type="cpu", index=0, backend="gloo", threads=1))
        model = build_model(read_architecture(folder), make_groups(Layout()), options)
        load_model(model, folder)
        for case in golden.cases():
            _replay_batch(golden, case, model)
    _replay_canvas(golden)
    return golden.rows()


def _one_step(golden: Golden) -> Tensor:
    """Commit the recorded counts of one step."""
    logits, ids, masked, counts = (golden.read(f"step_{key}") for key in ("logits", "x", "mask", "k"))
    confidence, token = logits.softmax(dim=-1).max(dim=-1)
    out = ids.clone()
    for sample, count in enumerate(counts.tolist()):
        places = masked[sample].nonzero()[:, 0]
        picks = Picks(
            tokens=token[sample, places].tolist(), confidence=confidence[sample, places].tolist(), entropy=[]
        )
        for place in choose(Decoding(), picks, count):
            out[sample, places[place]] = picks.tokens[place]
    return out


def _canvases(golden: Golden, options: Decoding, block: int) -> list[Canvas]:
    """Lay out the recorded prompts, padded on the left to whole blocks."""
    mask, pad, eos = (int(golden.read(f"{name}_id")) for name in ("mask", "pad", "eos"))
    rules = Rules(
        options=options,
        block=block,
        mask_id=mask,
        pad_id=pad,
        end_ids=frozenset({eos}),
        stop_ids=frozenset(),
        decode=str,
    )
    prompts = [golden.read(f"prompt{number}").tolist() for number in range(2)]
    length = -(-max(map(len, prompts)) // block) * block
    return [
        Canvas(rules, number, prompt, options.new_tokens, length - len(prompt))
        for number, prompt in enumerate(prompts)
    ]


def _replay_batch(golden: Golden, case: Case, model: TideModel) -> None:
    """Decode one recorded batch in both ways, and compare tokens and steps."""
    block, new_tokens, name = case["block_size"], case["max_new_tokens"], case["name"]
    per_block = case.get("steps_per_block")
    steps = per_block * math.ceil(new_tokens / block) if per_block else case["steps"]
    guidance, is_shifted = case.get("cfg_scale", 0.0), case.get("right_shift_logits", False)
    architecture = model.architecture
    model.architecture = dataclasses.replace(architecture, is_shifted=is_shifted)
    for cache in (True, False):
        options = Decoding(
            schedule="reference", new_tokens=new_tokens, steps=steps, guidance=guidance, cache=cache
        )
        canvases = _canvases(golden, options, block)
        context = Context(kind="block_diffusion", block_size=block)
        denoise(model, context, canvases, options, banned=())
        sequence = torch.tensor([canvas.ids for canvas in canvases])
        golden.compare(f"{name}, cache={cache}", {f"{name}_seq": sequence}, tolerance=0.0)
        history, lengths = golden.read(f"{name}_hist").long(), golden.read(f"{name}_hist_len")
        ours = [_state(canvases, history[step], step, int(lengths[step])) for step in range(len(history))]
        golden.compare(f"{name}, cache={cache}", {f"{name}_hist": torch.stack(ours)}, tolerance=0.0)
    model.architecture = architecture


def _state(canvases: list[Canvas], recorded: Tensor, step: int, length: int) -> Tensor:
    """Return what the canvases were after a step, [samples, slots], from when each token was committed."""
    state = torch.full_like(recorded, -1)
    for row, canvas in enumerate(canvases):
        tokens = torch.tensor(canvas.ids[:length])
        order = torch.tensor(canvas.order)[: length - canvas.reply_start]
        tokens[canvas.reply_start :][order >= step] = canvas.rules.mask_id
        state[row, :length] = tokens
    return state


def _replay_canvas(golden: Golden) -> None:
    """Compare positions and mask of a whole canvas; what pads see means nothing."""
    ids = golden.read("prep_x")
    canvases = _canvases(golden, Decoding(schedule="reference", new_tokens=16), 8)
    start = canvases[0].reply_start
    begun = [
        torch.equal(torch.tensor(one.ids[:start]), row[:start])
        for one, row in zip(canvases, ids, strict=True)
    ]
    golden.add("prep_x", "replayed" if all(begun) else "failed")
    golden.compare("prep_pos", {"prep_pos": torch.tensor([one.positions for one in canvases])}, tolerance=0.0)
    fed = [Fed(canvas=one, row=row, begin=0, end=one.length, wanted=()) for row, one in enumerate(canvases)]
    mask = pass_mask(Context(kind="block_causal", block_size=8), fed)
    assert mask is not None, "pads are hidden"
    visible = torch.stack([one.visible for one in canvases if one.visible is not None])
    golden.compare("prep_attn", {"prep_attn": mask & visible[:, None, :, None]}, tolerance=0.0)
