"""From a student to its exports: read, write beside, verify there, and only then take the place asked for."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import rich
from rich.progress import DownloadColumn, Progress
from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.base.disk import disk_faults, free_disk_bytes, place_of
from tide_megatron.base.errors import CheckpointError, ConfigError, TideError
from tide_megatron.base.files import replaced_folder
from tide_megatron.base.lease import lease_beside, leased
from tide_megatron.base.stop import StopFlag
from tide_megatron.base.units import in_bytes
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import write_context
from tide_megatron.export.card import CARD_FILE, model_card
from tide_megatron.export.checks import (
    CAUSAL,
    Check,
    answers,
    check_contract,
    check_logits,
    check_tensors,
    check_tokenizer,
    probe_ids,
    transformers_logits,
)
from tide_megatron.export.formats import FORMATS, STORED, ExportFormat, chosen_dtype
from tide_megatron.export.serving import write_server_files
from tide_megatron.export.student import TrainedStudent, read_student
from tide_megatron.models.hf.config import CONFIG_FILE, write_config
from tide_megatron.models.hf.folder import WEIGHTS, HfFolder
from tide_megatron.models.hf.safetensors import SHARD_BYTES, Plan, planned_bytes, write_tensors
from tide_megatron.models.params import param_mappings
from tide_megatron.models.weights import check_names
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

log = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
_SPARE_BYTES = 100_000_000  # tokenizer, card and what file systems keep for themselves


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How an export is made."""

    formats: tuple[str, ...]
    """Keys of FORMATS; several get a folder each."""
    shard_bytes: int = SHARD_BYTES
    dtype: str = STORED
    """`bf16`, `fp32`, or `stored`."""
    force: bool = False
    """Replace an export that stands there."""
    verify: bool = True
    """Load every form again and compare."""


def export_student(
    path: Path, out: Path, options: ExportOptions, *, device: Device, stop: StopFlag
) -> list[Check]:
    """Write a student in the wanted forms; a rank function for `run_ranks`, on one rank.

    Args:
        path: a run's folder or a model's.
        out: the export's folder; with several forms it holds a folder for each.
        options: see there.
        device: where logits are compared.
        stop: after a stop signal nothing is left behind.

    Returns:
        What was verified; empty without verification.

    Raises:
        CheckpointError: a damaged student, a disk that is full, an export that reads back different.
        ConfigError: forms this student cannot have, or an `out` that may not be replaced.
        DataError: no tokenizer.
        TideError: stopped.
    """
    formats = [FORMATS[name] for name in options.formats]
    student, out = read_student(path, formats), place_of(out)
    dtype = chosen_dtype(options.dtype)
    with (
        disk_faults(out),
        leased(lease_beside(out), str(out), stop=stop) as lease,
        HfFolder(student.folder) as source,
    ):
        _check_place(out, student.folder, options)
        check_names(student.architecture, source)
        plans = {form: form.plan(student.architecture, source, dtype) for form in formats}
        _check_space(out, sum(map(planned_bytes, plans.values())))
        expected = _expected(student, device) if options.verify else []
        checks: list[Check] = []
        with replaced_folder(out, WEIGHTS) as partial:
            folders = {form: partial / form.name if len(formats) > 1 else partial for form in formats}
            for form, folder in folders.items():
                folder.mkdir(exist_ok=True)
                _write(folder, form, student, source, plans[form], options.shard_bytes, stop)
            for form, folder in folders.items():
                if options.verify:
                    _refuse_when_stopped(stop)
                    log.info("%s: reading it back", form.name)
                    checks += _verify(folder, form, student, source, plans[form], expected, device)
            lease.check()
    log.info("%s: %s", out, ", ".join(form.name for form in formats))
    return checks


def _check_place(out: Path, source: Path, options: ExportOptions) -> None:
    """Refuse a place that holds something else than an export, or one that nobody said to replace."""
    if source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"OUT: {out} holds the student itself; choose another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_export = (out / CONFIG_FILE).is_file() or (
        out.is_dir() and {path.name for path in out.iterdir()} <= FORMATS.keys()
    )
    if not is_export:
        raise ConfigError(f"OUT: {out} exists and is no export; choose another folder")
    if not options.force:
        raise ConfigError(f"OUT: {out} exists; choose another folder, or --force to replace it")


def _check_space(out: Path, wanted: int) -> None:
    """Refuse to begin what the disk cannot hold; an older export goes only when the new one stands."""
    free = free_disk_bytes(out.resolve().parent)
    if free < wanted + _SPARE_BYTES:
        raise CheckpointError(
            f"{out}: needs {in_bytes(wanted + _SPARE_BYTES)}, the disk has {in_bytes(free)}; make room, "
            "choose another disk, or export fewer forms at a time (--format)"
        )


def _write(
    folder: Path,
    form: ExportFormat,
    student: TrainedStudent,
    source: HfFolder,
    plan: Plan,
    shard_bytes: int,
    stop: StopFlag,
) -> None:
    """Write one form into a folder."""
    dtypes = {planned.dtype for planned in plan.values()}
    dtype = str(max(dtypes, key=lambda kind: kind.itemsize)).removeprefix("torch.")
    block_size = student.block_size
    write_config(folder, form.config(student.architecture, student.special, block_size, dtype))
    ids = {f"{name}_token_id": number for name, number in student.special.items() if name != "mask"}
    generation = {**ids, "do_sample": False, "max_new_tokens": 256}
    (folder / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    student.tokenizer.save(folder)
    if student.context is not None:
        write_context(folder, student.context)
    if form.serves_blocks:
        write_server_files(folder, form, student)
    parameters = sum(piece.elements for piece in param_mappings(student.architecture) if piece.is_parameter)
    (folder / CARD_FILE).write_text(model_card(form, student, parameters), encoding="utf-8")
    tensors = form.read(student.architecture, source, plan)
    write_tensors(folder, plan, _watched(form.name, tensors, planned_bytes(plan), stop), shard_bytes)


def _watched(
    title: str, tensors: Iterator[tuple[str, Tensor]], total: int, stop: StopFlag
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors behind a progress bar, which shows on terminals only."""
    columns = (*Progress.get_default_columns(), DownloadColumn())
    with Progress(*columns, transient=True, disable=not rich.get_console().is_terminal) as bar:
        task = bar.add_task(title, total=total)
        for name, tensor in tensors:
            _refuse_when_stopped(stop)
            yield name, tensor
            bar.advance(task, tensor.numel() * tensor.element_size())


def _refuse_when_stopped(stop: StopFlag) -> None:
    if stop.requested:
        raise TideError(f"stopped by {stop.reason}: nothing was written; the same command begins again")


def _contexts(student: TrainedStudent) -> list[Context]:
    """Return the trained context, or where nobody knows it the one that sees all, and the causal one."""
    return [student.context or Context(kind="bidirectional"), CAUSAL]


def _expected(student: TrainedStudent, device: Device) -> list[Tensor]:
    """Return what the student answers to the probe, in `_contexts`."""
    ids = probe_ids(student.tokenizer)
    return answers(student.folder, ids, _contexts(student), make_groups(Layout()), device)


def _verify(
    folder: Path,
    form: ExportFormat,
    student: TrainedStudent,
    source: HfFolder,
    plan: Plan,
    expected: Sequence[Tensor],
    device: Device,
) -> list[Check]:
    """Read one form back in every way there is."""
    ids, architecture = probe_ids(student.tokenizer), student.architecture
    exact = form.is_exact(architecture, source, plan)
    checks = [check_tensors(folder, form, student, source, plan)]
    own = answers(folder, ids, _contexts(student), make_groups(Layout()), device)
    checks.append(check_logits(form, "our reader against the student", expected[0], own[0], is_exact=exact))
    if form.model_type == "qwen3":
        theirs = transformers_logits(folder, ids)
        checks.append(check_logits(form, "transformers, causal, against ours", own[1], theirs))
    checks += check_contract(folder, form, student)
    checks.append(check_tokenizer(folder, form, student))
    return checks
