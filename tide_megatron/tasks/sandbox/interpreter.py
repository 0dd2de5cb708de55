"""The Python that runs programs: the one below this environment, without what is installed beside it."""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tide_megatron.tasks.sandbox.errors import SandboxError

INSIDE = str(Path(__file__).resolve().parent / "inside")
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")
_QUERY = """
import glob, importlib, json, os, sys, sysconfig
folders = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
for file in glob.glob(os.path.join(folders[1], "lib-dynload", "*.so")):
    name = os.path.basename(file).split(".")[0]
    if "test" not in name:
        try:
            importlib.import_module(name)
        except Exception:
            pass
with open("/proc/self/maps") as maps:
    files = {line.split(None, 5)[5].strip() for line in maps if ".so" in line and line.count("/")}
packages = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
print(json.dumps({"folders": folders, "files": sorted(files), "packages": packages}))
"""
"""Imports every extension module, to see which shared libraries they need."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpreter:
    """Where it lies, and what it reads."""

    program: str
    shown: tuple[str, ...]
    """Files and folders that it needs, parents before children."""
    covered: tuple[str, ...]
    """Folders of installed packages below these: benchmarks come with their answers."""

    def readable(self) -> list[str]:
        """Return `shown` without what is covered, for rules that can only allow."""
        return [place for path in self.shown for place in _without(path, self.covered)]


@functools.lru_cache(maxsize=1)
def find_interpreter() -> Interpreter:
    """Ask the interpreter below this process's virtual environment what it needs.

    Raises:
        SandboxError: it does not start without the environment of this process.
    """
    program = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    try:
        answer = subprocess.run(
            [program, "-I", "-S", "-B", "-c", _QUERY],
            stdin=subprocess.DEVNULL, capture_output=True, env={}, timeout=120, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as fault:
        raise SandboxError(f"{program} does not start without this process's environment: {fault}") from None
    told = json.loads(answer.stdout)
    shown = {*_SYSTEM, *told["folders"], *told["files"], program}
    names = ("site-packages", "dist-packages")
    beside = [os.path.join(folder, name) for folder in told["folders"] for name in names]
    system = [*glob.glob("/usr/lib/python3*/dist-packages"), *glob.glob("/usr/local/lib/python3*/*-packages")]
    covered = {path for path in (*beside, *system, *told["packages"]) if os.path.isdir(path)}
    return Interpreter(program=program, shown=tuple(_outermost(shown)), covered=tuple(sorted(covered)))


def _outermost(paths: Iterable[str]) -> list[str]:
    """Return paths, sorted, without those below another one; what is below a link is not below it."""
    kept: list[str] = []
    for path in sorted(paths):
        if not any(path.startswith(other + "/") and not os.path.islink(other) for other in kept):
            kept.append(path)
    return kept


def _without(path: str, covered: tuple[str, ...]) -> list[str]:
    """Return a folder, or in its place what it holds where something below it is covered."""
    if path in covered:
        return []
    if os.path.islink(path) or not any(place.startswith(path + "/") for place in covered):
        return [path]
    inside = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    return [place for one in inside for place in _without(one, covered)]
