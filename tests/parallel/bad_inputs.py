"""Faults to plant into a tiny run, what must be said of each, and rank functions that meet them.

A fault is a function that damages a run's folder, or words that are put behind the recipe.
"""

import dataclasses
import json
import shutil

import numpy
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.small_tokenizer import write_tokenizer
from tide_megatron.base.device import choose_device
from tide_megatron.base.errors import TideError
from tide_megatron.base.stop import StopFlag
from tide_megatron.data.columns import digest_file
from tide_megatron.data.manifest import read_manifest
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe


def cut(name, share=0.5):
    def fault(run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: int(len(content) * share)])

    return fault


def remove(name):
    def fault(run):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return fault


def edit(name, **changes):
    """Change (None: remove) keys of a JSON file."""

    def fault(run):
        content = {**json.loads((run / name).read_text()), **changes}
        kept = {key: value for key, value in content.items() if value is not None}
        (run / name).write_text(json.dumps(kept))

    return fault


def drop_a_tensor(run):
    file = run / "teacher/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file)


def name_a_missing_shard(run):
    file = run / "teacher/model.safetensors"
    places = dict.fromkeys(load_file(file), "model-00001-of-00002.safetensors")
    places["lm_head.weight"] = "model-00002-of-00002.safetensors"
    file.rename(run / "teacher/model-00001-of-00002.safetensors")
    (run / "teacher/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def swap_two_tokens(run):
    """Give two entries of the teacher's vocabulary each other's id."""
    file = run / "teacher/tokenizer.json"
    content = json.loads(file.read_text())
    entries = content["model"]["vocab"]
    left, right = (spelling for spelling, token in entries.items() if token in (70, 71))
    entries[left], entries[right] = entries[right], entries[left]
    file.write_text(json.dumps(content))


def leave_no_mask(run):
    """A tokenizer without a mask token."""
    write_tokenizer(run / "student", special=("<|pad|>", "<|im_start|>", "<|im_end|>"))


def prepare_for_another_tokenizer(run):
    """Data that was prepared when the student had another template."""
    edit("student/tokenizer_config.json", chat_template="{{ messages }}")(run)


def mix_columns(run, *, same_size):
    """Replace the replies by another data set's, and sign for it in the manifest."""
    folder, manifest = run / "data/train", read_manifest(run / "data/train")
    for ending in ("bin", "idx"):
        name = f"replies.{ending}"
        if same_size:  # the same numbers, but every reply ends behind its text
            content = bytearray((folder / name).read_bytes())
            if ending == "bin":
                content[4:8] = (10_000).to_bytes(4, "little")
            (folder / name).write_bytes(bytes(content))
        else:
            shutil.copy(run / "data/held_out" / name, folder / name)
        file = folder / name
        manifest.files[name] = {"bytes": file.stat().st_size, "sha256": digest_file(file)}
    dataclasses.replace(manifest).write(folder)


def write_an_id_beyond_all_vocabularies(run):
    """Spoil every sample's first token, and sign for it in the manifest."""
    folder, manifest = run / "data/train", read_manifest(run / "data/train")
    ids, file = numpy.fromfile(folder / "ids.bin", dtype=numpy.int32), folder / "ids.bin"
    ids[:] = numpy.where(ids == ids[0], 70_000, ids)
    ids.tofile(file)
    manifest.files["ids.bin"] = {"bytes": file.stat().st_size, "sha256": digest_file(file)}
    dataclasses.replace(manifest).write(folder)


def change_one_id(run):
    file = run / "data/train/ids.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\x01")


LAYOUTS = {
    # name: (words for four ranks, what is said)
    "more stages than layers": (
        ["teachers.dense.layout.pipeline=4"],
        r"^teachers\.dense\.layout \{pipeline=4\}: 3 layers .* nearest legal layout is ",
    ),
    "key-value heads that do not divide": (
        ["teachers.dense.layout.tensor=4"],
        r"^teachers\.dense\.layout \{tensor=4\}: 2 key-value heads .* nearest legal layout is ",
    ),
    "experts that do not divide": (
        ["teachers.own.layout.expert=4", "teachers.own.layout.pipeline=2"],
        r"^teachers\.own\.layout .* nearest legal layout is ",
    ),
    "an expert width that does not divide": (
        ["teachers.moe.layout.expert_tensor=4", "teachers.moe.folder={run}/narrow"],
        r"^teachers\.moe\.layout\.expert_tensor: 4 ranks cannot .* width 18 evenly; use expert_tensor=2$",
    ),
    "a student cut over tensor ranks": (
        ["student.layout.tensor=2"],
        r"^student\.layout\.tensor: 2 is not available yet for a model that is trained",
    ),
    "head groups that cut a replica": (
        ["teachers.dense.layout.tensor=2", "teachers.dense.layout.pipeline=2", "head.ranks=2"],
        r"^head\.ranks: 2 must be a multiple of every teacher's replica .* nearest legal size is 4$",
    ),
    "head groups that do not divide the ranks": (
        ["head.ranks=3"],
        r"^head\.ranks: 3 must .* divide the 4 ranks of this run; the nearest legal size is ",
    ),
}

FAULTS = {
    # name: (fault or words, kind of error, what is said: key or file, and remedy)
    "a misspelt key": (
        ["losses.kl.temprature=2"],
        "Config",
        r"^losses\.kl\.temprature: unknown .* 'temperature'",
    ),
    "a wrong type": (["steps=many"], "Config", r"^steps: 'many' is not valid: .*integer"),
    "an impossible layout": (
        ["teachers.moe.layout.expert=3"],
        "Config",
        r"^teachers\.moe\.layout \{expert=3\}: 4 experts cannot .* nearest legal layout is ",
    ),
    "a layout without experts": (
        ["student.layout.expert=1", "student.layout.expert_tensor=2"],
        "Config",
        r"^student\.layout .* no experts; the nearest legal layout is ",
    ),
    "a replica beyond the ranks": (
        ["teachers.moe.layout.tensor=8"],
        "Config",
        r"^teachers\.moe\.layout \{tensor=8\}: .* does not divide the \d+ ranks .* nearest legal layout is ",
    ),
    "vocabulary heads in FP8": (
        ["head.precision=fp8"],
        "Config",
        r"^head\.precision: .*fp8 is refused for vocabulary heads .* use weights or fp32",
    ),
    "a head budget below one row": (
        ["head.budget_mib=9"],
        "Config",
        r"^head\.budget_mib: 9 MiB do not hold .* single row here; use at least 10, or more head\.ranks$",
    ),
    "a head budget above what is free": (
        ["head.budget_mib=99999999"],
        "Config",
        r"^head\.budget_mib: 99999999 MiB are more than there is, rank 0 has \d+ MiB of cpu memory free "
        r"beside its models; use at most \d+, or leave it out$",
    ),
    "a temperature of nothing": (
        ["losses.kl.temperature=0"],
        "Config",
        r"^losses\.kl\.temperature: .*greater than 0",
    ),
    "a batch that cannot be shared": (
        ["batch.microbatch=3", "batch.samples=32"],
        "Config",
        r"^batch\.microbatch: 3 does not divide the \d+ samples .*; use 2$",
    ),
    "a length below the longest sample": (
        ["data.fixed_length=9"],
        "Config",
        r"fixed_length: 9 is below the longest sample of .*data/train .*; use 72 or more$",
    ),
    "a schedule that differs": (
        ["noise.schedule=cosine"],
        "Config",
        r"^losses\.ce\.schedule: 'linear' .* noise\.schedule 'cosine' .*; set both alike$",
    ),
    "more shared ids than there are": (
        ["losses.kl.shared_vocab_size=1000"],
        "Config",
        r"^losses\.kl\.shared_vocab_size: 1000 exceeds .*; use at most 320$",
    ),
    "shared ids that differ": (
        swap_two_tokens,
        "Config",
        r"^losses\.kl: 2 of the first 312 ids are different bytes .*id 70: .*; set shared_vocab_size to 70",
    ),
    "a teacher that knows nothing": (
        ["teachers.moe.sanity=refuse"],
        "Config",
        r"^teachers\.moe: predicts masked tokens at .* check its mask token, .*teachers\.moe\.sanity=warn$",
    ),
    "no model folder": (
        remove("teacher"),
        "Checkpoint",
        r"bad/teacher: no such model folder; give a local folder",
    ),
    "no config.json": (
        remove("student/config.json"),
        "Checkpoint",
        r"student/config\.json: missing; .*needs it$",
    ),
    "an unknown model type": (
        edit("student/config.json", model_type="gpt2"),
        "Config",
        r"bad/student: config\.json: model_type: 'gpt2' is not supported; choose one of: Dream, a2d-qwen3, ",
    ),
    "no weights": (
        remove("teacher/model.safetensors"),
        "Checkpoint",
        r"bad/teacher: neither model\.safetensors nor .* is there; download it whole$",
    ),
    "truncated weights": (
        cut("teacher/model.safetensors"),
        "Checkpoint",
        r"teacher/model\.safetensors: damaged or truncated .*; copy or download it again$",
    ),
    "weights short of the last bytes": (
        cut("student/model.safetensors", 0.9999),
        "Checkpoint",
        r"student/model\.safetensors: damaged or truncated .*; copy or download it again$",
    ),
    "a missing tensor": (
        drop_a_tensor,
        "Checkpoint",
        r"bad/teacher: the weights do not fit (.|\n)*1 missing: \S*experts\.3\.up_proj\S*(.|\n)*check",
    ),
    "a missing shard": (
        name_a_missing_shard,
        "Checkpoint",
        r"bad/teacher: .*index\.json names files that are not there: model-00002\S*; download it whole$",
    ),
    "no tokenizer": (
        remove("student/tokenizer.json"),
        "Data",
        r"student: a tokenizer is a folder with tokenizer",
    ),
    "a damaged tokenizer": (
        cut("teacher/tokenizer.json"),
        "Data",
        r"teacher/tokenizer\.json: cannot be read as JSON .*; copy the tokenizer again$",
    ),
    "no mask token": (
        leave_no_mask,
        "Data",
        r"^student: .*no file names a mask token, .*: name .*; .*`tide model add-mask .*/student`",
    ),
    "a mask token that ends text": (
        ["student.mask=<|im_end|>"],
        "Data",
        r"student/tokenizer\.json: the mask token '<\|im_end\|>' is also the end .*: choose another",
    ),
    "no data": (remove("data/train"), "Data", r"data/train: no prepared data .*: run `tide prepare`$"),
    "no held-out data": (
        remove("data/held_out"),
        "Data",
        r"data/held_out: no prepared data .*: run `tide prepare`$",
    ),
    "data of another tokenizer": (
        prepare_for_another_tokenizer,
        "Data",
        r"data/train: prepared with another tokenizer or chat template .*: prepare the data again",
    ),
    "a data file cut in the middle": (
        cut("data/train/ids.bin"),
        "Data",
        r"data/train/ids\.bin: 3620 bytes, the manifest says 7240: it was cut .*; copy it again or prepare",
    ),
    "a data file with other content": (
        change_one_id,
        "Data",
        r"data/train/ids\.bin: its content changed after preparation .*: prepare the data again$",
    ),
    "a cut index": (
        cut("data/train/ids.idx"),
        "Data",
        r"data/train/ids\.idx: .*it was cut .*; copy it again or prepare",
    ),
    "a missing column": (
        remove("data/train/replies.bin"),
        "Data",
        r"train/replies\.bin: missing: prepare .*or copy",
    ),
    "columns of different length": (
        lambda run: mix_columns(run, same_size=False),
        "Data",
        r"data/train/replies\.idx: 8 samples .* says 40 .*: the columns disagree; prepare the data again$",
    ),
    "columns that disagree": (
        lambda run: mix_columns(run, same_size=True),
        "Data",
        r"data/train: columns ids and replies disagree at sample 0 .*: prepare the data again$",
    ),
    "a cut manifest": (
        cut("data/train/manifest.json"),
        "Data",
        r"train/manifest\.json: cannot be read .*: prepare",
    ),
    "an edited manifest": (
        edit("data/train/manifest.json", samples=3),
        "Data",
        r"data/train/manifest\.json: was edited after preparation .*: prepare the data again$",
    ),
}


def plant(fault, run):
    """Damage the run in this folder, or return the words to put behind its recipe."""
    if isinstance(fault, list):
        return fault
    fault(run)
    return []


def attempt(file, words):
    """Train on this rank; return (kind, message) of the user's fault, or None when there was none."""
    try:
        recipe, tree = load_recipe(file, words)
        train(recipe, tree, True, device=choose_device("cpu"), stop=StopFlag())
    except TideError as fault:
        return type(fault).__name__, str(fault)
    return None


def one_rank_sees(good, bad, words, rank, folder, *, device, stop):
    """Train with the experts over all ranks; one rank reads its own, damaged copy of everything."""
    is_faulty = dist.get_rank() == rank
    common = [f"folder={folder}", f"teachers.moe.layout.expert={dist.get_world_size()}"]
    recipe, tree = load_recipe(bad if is_faulty else good, [*common, *(words if is_faulty else [])])
    return train(recipe, tree, True, device=device, stop=stop)
