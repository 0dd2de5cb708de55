"""The machine itself: versions and engines, and the pack's own check of Transformer Engine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys

from tide_megatron.platform import prepare_platform

import torch

from gpu_check.rows import NotMeasured, Place, Row
from tide_megatron.base.device import choose_device
from tide_megatron.launch.doctor import examine

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "numpy", "pydantic")
OPTIONAL = ("wandb",)
"""Packages of ours that a bare machine lacks; no run needs them unless its recipe says so."""
PACK_SECONDS = 150


def check_facts(place: Place) -> list[Row]:
    """Say driver, card, torch, NCCL, megatron-core, and which engines and kernels a run would take here."""
    device = choose_device(place.device)
    found: dict[str, object] = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    done = prepare_platform()
    found |= {"redirected to CPU": done.redirected_to_cpu, "torch's Adam repaired": done.torch_adam_repaired}
    found |= {name: value for name, value in device.facts().items() if name != "torch"}
    if place.device == "cuda":
        card = torch.cuda.get_device_properties(device.index)
        found |= {
            "capability": f"{card.major}.{card.minor}",
            "memory GiB": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": _driver(),
        }
    return [
        Row(check="facts", text=", ".join(f"{name} {value}" for name, value in found.items()), figures=found)
    ]


def _driver() -> str:
    """Return the NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        lines = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False
        ).stdout.split()
        return lines[0] if lines else "unknown"
    return "unknown"


def check_doctor(place: Place) -> list[Row]:
    """Call `tide doctor`, as a user would do first."""
    findings = list(examine(place.device))
    faults = [
        f"{finding.topic}: {finding.value}"
        for finding in findings
        if finding.verdict == "fault" and finding.topic not in OPTIONAL
    ]
    figures = {finding.topic: finding.value for finding in findings}
    if faults:
        return [Row(check="doctor", verdict="failed", text="; ".join(faults), figures=figures)]
    return [Row(check="doctor", text=f"{len(findings)} findings, no fault", figures=figures)]


def check_pack(place: Place) -> list[Row]:
    """Make the pack's own checks: Transformer Engine, and megatron-core on it."""
    pack = place.assets / "pack"
    if not (pack / "check_pack.py").is_file():
        raise NotMeasured("no pack in the assets: GPU_PACK named none when they were made")
    if place.transformer_engine is None or place.device != "cuda":
        raise NotMeasured("Transformer Engine's kernels need a GPU")
    report = place.scratch / "pack.json"
    command = [sys.executable, "-P", str(pack / "check_pack.py"), "--json", str(report), "--timeout", "60"]
    line = f'. "{place.transformer_engine / "env.sh"}" && exec "$@"'
    done = subprocess.run(
        ["bash", "-c", line, "pack", *command],
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdout=sys.stdout.fileno(),
        stderr=subprocess.STDOUT,
        timeout=PACK_SECONDS,
        check=False,
    )
    if not report.is_file():
        return [Row(check="pack", verdict="failed", text=f"it ended with {done.returncode} (see the log)")]
    return [
        Row(
            check=f"pack {result['name']}",
            verdict="passed" if result["passed"] else "failed",
            text=result["text"][:400],
            figures={"seconds": result["seconds"]},
        )
        for result in json.loads(report.read_text())
    ]
