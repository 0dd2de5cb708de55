"""What `tide doctor` finds out: software, machine, engines, and whether parallel equals dense here.

Versions and the machine are read without starting anything. The check starts two real ranks the way a run
does, adds numbers up over them, and runs one tiny expert-parallel mixture model against the same model on one
rank: the shortest program that needs launcher, process groups, megatron-core, the dispatcher and the weights
all to work.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from tide_megatron.platform import prepare_platform
from tide_megatron.platform.grad_norm import has_foreign_apex

import psutil
import torch
import torch.distributed as dist

from tide_megatron import __version__
from tide_megatron.base.device import Device, Wanted, choose_device
from tide_megatron.base.errors import RanksFailed, TideError
from tide_megatron.base.stop import StopFlag
from tide_megatron.base.transformer_engine import find_transformer_engine
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import View
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models.arch.llada2_moe import Llada2Moe
from tide_megatron.models.attention import KERNELS, choose_kernel
from tide_megatron.models.build import build_model
from tide_megatron.models.engine import Engine
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.collectives import Traffic, gather_objects
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

Verdict = Literal["ok", "note", "fault"]

NUM_RANKS = 2
LEAST_FREE_BYTES = 5 * 2**30
"""Below this, free disk space is worth a note."""
TOLERANCE = 1e-5
"""Largest difference of fp32 hidden states (of size about 1) between parallel and dense."""

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "wandb",
)

TINY = {
    "model_type": "llada2_moe",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.2,
}
"""config.json of the model that the check builds; Inductor compiles no attention for smaller heads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's table; only a `fault` makes the exit code 1."""

    topic: str
    value: str
    verdict: Verdict = "ok"


def examine(wanted: Wanted) -> Iterator[Finding]:
    """Yield findings one by one, the quick ones first; the last ones start two ranks."""
    yield from _software()
    device = choose_device(wanted)
    yield from _machine(device)
    yield from _engines(device)
    yield from check_ranks(device)


def _software() -> Iterator[Finding]:
    yield Finding(topic="tide-megatron", value=__version__)
    for package in PACKAGES:
        version = _version(package)
        yield Finding(topic=package, value=version, verdict="fault" if version == "missing" else "ok")
    platform = prepare_platform()
    changes = [
        *(["CUDA names point at the CPU"] if platform.redirected_to_cpu else []),
        *(["torch's Adam repaired for checkpoints"] if platform.torch_adam_repaired else []),
    ]
    yield Finding(topic="megatron-core here", value=", ".join(changes) or "as it is")


def _machine(device: Device) -> Iterator[Finding]:
    for topic, value in device.facts().items():
        if topic != "torch":
            yield Finding(topic=topic, value=str(value))
    cores = len(os.sched_getaffinity(0))
    setting = os.environ.get("OMP_NUM_THREADS", "not set: shared among ranks")
    yield Finding(topic="cores", value=f"{cores} (OMP_NUM_THREADS {setting})")
    yield Finding(topic="free memory", value=_gibibytes(psutil.virtual_memory().available))
    free = shutil.disk_usage(Path.cwd()).free
    note: Verdict = "ok" if free >= LEAST_FREE_BYTES else "note"
    yield Finding(topic="free disk here", value=_gibibytes(free), verdict=note)


def _engines(device: Device) -> Iterator[Finding]:
    maker = choose_kernel("auto", device.type, trainable=True)
    kernel = next(name for name, known in KERNELS.items() if known is maker)
    yield Finding(topic="attention", value=f"{kernel} (of {', '.join(KERNELS)})")
    yield Finding(topic="layers", value=str(Engine.on("auto", Precision.on("auto", device), device)))
    yield _transformer_engine()
    yield _apex()


def _transformer_engine() -> Finding:
    """Say whether Transformer Engine can be used."""
    found, topic = find_transformer_engine(), "Transformer Engine"
    if not found.is_installed:
        return Finding(topic=topic, value="not installed (optional)")
    value = " ".join(part for part in (found.version, found.fault) if part)
    return Finding(topic=topic, value=value, verdict="ok" if found.is_usable else "note")


def _apex() -> Finding:
    """Say whether NVIDIA's Apex is here; the package that PyPI calls apex is something else."""
    if importlib.util.find_spec("amp_C") and not _import_fault("apex.multi_tensor_apply"):
        return Finding(topic="Apex", value="NVIDIA's")
    if has_foreign_apex():
        return Finding(
            topic="Apex", value="PyPI's apex is not NVIDIA's: not used; pip uninstall apex", verdict="note"
        )
    return Finding(topic="Apex", value="not installed (optional)")


def check_ranks(device: Device) -> list[Finding]:
    """Start two ranks on the device, and report on collectives and on expert parallelism against dense."""
    if device.type == "cuda" and torch.cuda.device_count() < NUM_RANKS:
        value = "one GPU is too few; CUDA_VISIBLE_DEVICES= tide doctor checks ranks on the CPU"
        return [Finding(topic=f"{NUM_RANKS} ranks", value=value, verdict="note")]
    try:
        found = run_ranks(compare_parallel, (), NUM_RANKS, device.type)
    except (TideError, RanksFailed) as error:
        return [Finding(topic=f"{NUM_RANKS} ranks", value=str(error).strip(), verdict="fault")]
    return judge(found)


def judge(found: dict[str, Any]) -> list[Finding]:
    """Turn what `compare_parallel` measured into findings."""
    is_sum_right = found["sum"] == sum(range(1, NUM_RANKS + 1))
    is_equal = found["difference"] <= TOLERANCE and found["alltoall_bytes"] > 0
    return [
        Finding(
            topic=f"{NUM_RANKS} ranks",
            value=f"sum over {found['backend']} {'right' if is_sum_right else 'WRONG: ' + str(found['sum'])}",
            verdict="ok" if is_sum_right else "fault",
        ),
        Finding(
            topic="expert-parallel = dense",
            value=f"largest difference {found['difference']:.1e}, {found['alltoall_bytes']} bytes all-to-all",
            verdict="ok" if is_equal else "fault",
        ),
    ]


def compare_parallel(*, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Add up over all ranks; compare a mixture over all ranks with the same on each. All ranks call it.

    Returns:
        `sum` of rank + 1 over ranks, `difference` (largest over ranks of hidden states), `alltoall_bytes` of
        this rank in the parallel model (0 would mean that nothing was parallel), `backend`.
    """
    world = dist.get_world_size()
    total = torch.tensor(float(dist.get_rank() + 1), device=device.torch_device)
    dist.all_reduce(total)
    view = _view(dist.get_rank(), device)
    with torch.no_grad():
        dense, _ = _hidden(view, Layout(), device)
        parallel, traffic = _hidden(view, Layout(expert=world), device)
    differences = gather_objects(float((dense - parallel).abs().max()))
    sent = sum(count for kind, count in traffic.bytes.items() if "alltoall" in kind)
    return {
        "sum": float(total),
        "difference": max(differences),
        "alltoall_bytes": sent,
        "backend": device.backend,
    }


def _hidden(view: View, layout: Layout, device: Device) -> tuple[torch.Tensor, Traffic]:
    """Run the tiny model cut as `layout`; all ranks together."""
    # Dense attention on every device: what is compared is layouts, and `Traffic` sees no FlexAttention.
    options = ModelOptions(device=device, layout=layout, attention="dense")
    model = build_model(Llada2Moe.from_hf(TINY), make_groups(layout), options)
    draw_weights(model, seed=0)
    with Traffic() as traffic:
        return model.rows(view), traffic


def _view(rank: int, device: Device, length: int = 8) -> View:
    """Return a fixed input that differs from rank to rank."""
    ids = (torch.arange(length, device=device.torch_device) * (rank + 3) % TINY_VOCABULARY)[None]
    positions = torch.arange(length, device=device.torch_device)
    context = Context(kind="bidirectional")
    return View(
        ids=ids, positions=positions[None], context=context, length=length, segments=None, rows=positions
    )


TINY_VOCABULARY = int(str(TINY["vocab_size"]))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _import_fault(module: str, load: Callable[[str], object] = importlib.import_module) -> str | None:
    """Try to import a module; return what went wrong, in one line."""
    try:
        load(module)
    except Exception as error:  # a broken native extension raises anything
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _gibibytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
