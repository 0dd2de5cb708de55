"""A private copy of the tree in which one file at a time is spoilt and chosen tests are run.

The working tree is never touched. Each run is a fork of this process, which has imported torch and pytest but
nothing of ours: that saves most of a test run's time and keeps the runs apart, since every one imports the
spoilt file afresh. A run ends with the outcome of each test, or with "hang" when it passes its time limit.
Ranks that a test spawns read the copy too, for they inherit the import path.

Left out: running several at once. Tests of several ranks use all cores as it is.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("tide_megatron", "tests", "tools", "examples", "configs", "pyproject.toml")
PRELOADED = ("torch", "torch.distributed", "pydantic.dataclasses", "numpy", "hypothesis", "pytest")
RED = ("failed", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of some tests showed."""

    tests: dict[str, str]
    """Test id -> "passed", "skipped", "failed", or "error" (also of a file that cannot be imported)."""
    durations: dict[str, float]
    """Test id -> seconds of its setup, call and teardown."""
    hung: bool
    seconds: float
    output: str

    @property
    def red(self) -> list[str]:
        """Ids of the tests that failed."""
        return [test for test, word in self.tests.items() if word in RED]

    def is_red(self, test: str) -> bool:
        """Say whether a test, a case of it, or a test inside it (of a file) failed."""
        return any(_belongs(name, test) for name in self.red)

    def passes(self, test: str) -> bool:
        """Say whether at least one test of this name ran and passed, and none failed."""
        ran = any(word == "passed" and _belongs(name, test) for name, word in self.tests.items())
        return ran and not self.is_red(test)

    def seconds_of(self, tests: Sequence[str]) -> float:
        """Return what a selection of these tests would take in a run of its own."""
        own = sum(
            seconds for name, seconds in self.durations.items() if any(_belongs(name, test) for test in tests)
        )
        return own + self.seconds - sum(self.durations.values())


def _belongs(name: str, test: str) -> bool:
    return name == test or name.startswith((f"{test}[", f"{test}::", f"{test}/"))


class Sandbox:
    """The copy; use it as a context, it is deleted at the end."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="faults_")
        self.path = Path(self._folder.name).resolve()
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", ".*")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.path / name, ignore=ignored)
            elif source.exists():
                shutil.copy(source, self.path / name)
        # Before torch is imported, once: threads of a pool would not survive the fork.
        os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        os.environ.setdefault("TIDE_GOLDENS", str(ROOT / "tests" / "golden" / "data"))
        for name in PRELOADED:
            __import__(name)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *fault: object) -> None:
        self._folder.cleanup()

    @contextlib.contextmanager
    def spoilt(self, file: str, text: str) -> Iterator[None]:
        """Put another text in a file of the copy for the time of the block."""
        path = self.path / file
        original = path.read_text(encoding="utf-8")
        path.write_text(text, encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(original, encoding="utf-8")

    def run(self, tests: Sequence[str], *, limit_seconds: float, stop_at_first: bool) -> Outcome:
        """Run tests of the copy as it stands.

        Args:
            tests: files, folders or test ids, run in this order.
            limit_seconds: when the run and all its ranks are killed.
            stop_at_first: end at the first failure.
        """
        start = time.monotonic()
        report, output = self.path / "report.json", self.path / "output.txt"
        report.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _be_pytest(self.path, tests, stop_at_first)
        hung = not _ends_within(child, limit_seconds)
        said = output.read_text(errors="replace") if output.exists() else ""
        found = json.loads(report.read_text()) if report.exists() and not hung else ({}, {})
        if not hung and not found[0]:
            raise RuntimeError(f"no test ran of {list(tests)}:\n{said[-2000:]}")
        return Outcome(
            tests=found[0],
            durations=found[1],
            hung=hung,
            seconds=time.monotonic() - start,
            output=said,
        )


def _ends_within(child: int, limit_seconds: float) -> bool:
    """Wait for a child; kill it with its whole group when it takes too long, and what it left in any case."""
    deadline, ended = time.monotonic() + limit_seconds, False
    try:
        while not ended and time.monotonic() < deadline:
            ended = os.waitpid(child, os.WNOHANG)[0] == child
            time.sleep(0.0 if ended else 0.02)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        if not ended:
            os.waitpid(child, 0)
    return ended


def _be_pytest(copy: Path, tests: Sequence[str], stop_at_first: bool) -> None:
    """Turn this forked process into a test run of the copy; never returns."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        sink = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.chdir(copy)
        outside = {str(ROOT), str(ROOT / "tools"), ""}
        sys.path[:] = [str(copy), str(copy / "tools"), *(path for path in sys.path if path not in outside)]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        for name in [name for name in sys.modules if name.split(".")[0] in ("faults", "tests")]:
            del sys.modules[name]
        # Ranks that are spawned would import this program again as their main module.
        sys.modules["__main__"] = types.ModuleType("__main__")
        _pytest(copy, tests, stop_at_first)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def _pytest(copy: Path, tests: Sequence[str], stop_at_first: bool) -> None:
    import hypothesis
    import pytest

    # The same examples every time, no time limit on a busy machine, no search for the smallest failure.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile(
        "faults", derandomize=True, deadline=None, database=None, phases=phases
    )
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--hypothesis-profile=faults", "-m", "not slow"]
    recorder = _Recorder()
    pytest.main([*options, *(["-x"] if stop_at_first else []), *tests], plugins=[recorder])
    strangers = [
        name
        for name, module in sys.modules.items()
        if name.split(".")[0] == "tide_megatron" and not str(module.__file__).startswith(str(copy))
    ]
    assert not strangers, f"imported from outside the copy: {strangers}"
    (copy / "report.json").write_text(json.dumps([recorder.outcomes, recorder.durations]))


class _Recorder:
    """A pytest plugin that keeps each test's outcome; the worst of setup, call and teardown counts."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.durations: collections.Counter[str] = collections.Counter()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "error"

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.durations[report.nodeid] += report.duration
        if report.failed:
            self.outcomes[report.nodeid] = "failed" if report.when == "call" else "error"
        elif report.when == "call" or report.skipped:
            self.outcomes.setdefault(report.nodeid, report.outcome)
