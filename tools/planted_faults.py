"""Spoil the code on purpose, one mistake at a time in a copy, and see that the tests notice.

    python tools/planted_faults.py [--only NAME]...          (make faults: about six minutes)

The dozen are mistakes after which a run still goes well and its loss still looks right: a wrong adjoint, a
lost scale, a divisor of one rank, a mask that leaks, a shard in the wrong order. A fault is a pattern that is
searched below a folder, so it follows code that is moved or whose surroundings change; all that it matches is
spoilt. One that matches nothing any more has to be written anew (tests/unit/test_planted_faults.py says so
at once). The exit code is 0 only if the tests pass unspoilt and every fault makes one of its tests fail.

Left out: random mutations of operators and constants. cosmic-ray does that from outside, without a line here.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("tide_megatron", "tests", "tools", "examples", "configs", "pyproject.toml")
LIMIT_SECONDS = 300.0
"""After that a run of tests hangs, which a reader of the result would notice, too."""
# Words for pytest: files, and which of their tests.
LOSSES = ("tests/unit/losses", "tests/unit/head")
MASKS = ("tests/unit/diffusion", "-k", "mask or view or padding")
MODELS = ("tests/unit/models", "-k", "weights")
STEP = ("tests/parallel/test_invariance.py", "-k", "sgd and accumulation")
VOCABULARY = ("tests/parallel/test_vocabulary_parallel.py", "-k", "one_step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One mistake that somebody could make."""

    below: str
    """Folder of the package."""
    pattern: str
    """Regular expression."""
    mistake: str
    """What stands in its place; `\\1` is its first group."""
    tests: tuple[str, ...]
    """Words for pytest: files or folders, and a choice of their tests; one of these must fail."""

    def applied(self, root: Path) -> dict[Path, str]:
        """Return the spoilt text of every file that the pattern matches; nothing is written.

        Raises:
            LookupError: there is none, or the tests are gone.
        """
        missing = [test for test in self.tests if "/" in test and not (root / test).exists()]
        texts = {path: path.read_text(encoding="utf-8") for path in (root / self.below).rglob("*.py")}
        found = {
            path: re.sub(self.pattern, self.mistake, text)
            for path, text in texts.items()
            if re.search(self.pattern, text)
        }
        if missing or not found:
            raise LookupError(
                f"no tests {missing}" if missing else f"nothing below {self.below} matches {self.pattern!r}"
            )
        return found


FAULTS = {
    # Adjoints: values agree, gradients do not.
    "a gather whose adjoint keeps the own part": Fault(
        below="tide_megatron/parallel",
        pattern=r"_reduce_scatter\((\w+), (\w+)\.flatten\(0, 1\), group=group\)",
        mistake=r"\1.copy_(\2[group.rank()])",
        tests=VOCABULARY,
    ),
    "a target that carries gradient": Fault(
        below="tide_megatron/losses",
        pattern=r"torch\.no_grad\(\)",
        mistake="torch.enable_grad()",
        tests=LOSSES,
    ),
    # Scales.
    "a divergence without the squared temperature": Fault(
        below="tide_megatron/losses",
        pattern=r"self\.temperature\s*\*\*\s*2 \* ",
        mistake="",
        tests=LOSSES,
    ),
    "a fused gradient without the temperature": Fault(
        below="tide_megatron/losses",
        pattern=r"\.mul_\(self\.temperature\)",
        mistake="",
        tests=LOSSES,
    ),
    # Divisors.
    "each rank divides by its own count": Fault(
        below="tide_megatron/train",
        pattern=r"\[\"divisors\"\]\.sum\(dim=0\)",
        mistake='["divisors"][torch.distributed.get_rank()]',
        tests=STEP,
    ),
    "ranks average what they should sum": Fault(
        below="tide_megatron/models",
        pattern=r"calculate_per_token_loss=True",
        mistake="calculate_per_token_loss=False",
        tests=STEP,
    ),
    # Masks.
    "a noised token sees its own clean block": Fault(
        below="tide_megatron/diffusion",
        pattern=r"key_clean & \(query_block > key_block\)",
        mistake="key_clean & (query_block >= key_block)",
        tests=MASKS,
    ),
    "pads and other samples of a pack are seen": Fault(
        below="tide_megatron/diffusion",
        pattern=r"\(own\[:, :, None\] == own\[:, None, :\]\) & (real\[:, :, None\])",
        mistake=r"\1",
        tests=MASKS,
    ),
    "rows of a pack point into its first sample": Fault(
        below="tide_megatron/diffusion",
        pattern=r"\+ to_start\[row\] ",
        mistake="",
        tests=("tests/unit/diffusion/test_packing.py",),
    ),
    # Shards.
    "a rank's range of the vocabulary begins one too late": Fault(
        below="tide_megatron",
        pattern=r"start = self\.rank \* self\.width\n",
        mistake="start = self.rank * self.width + 1\n",
        tests=VOCABULARY,
    ),
    "experts lie on the ranks in reverse": Fault(
        below="tide_megatron/models",
        pattern=r"return (expert // \(num_experts // self\.expert_size\))",
        mistake=r"return self.expert_size - 1 - \1",
        tests=MODELS,
    ),
    "gate and up are swapped": Fault(
        below="tide_megatron/models",
        pattern=r"torch\.cat\(list\(parts\)\)",
        mistake="torch.cat(list(parts)[::-1])",
        tests=MODELS,
    ),
    "query, key and value are stacked instead of interleaved": Fault(
        below="tide_megatron/models",
        pattern=r"torch\.cat\(blocks, dim=1\)\.flatten\(0, 1\)",
        mistake="torch.cat([query, key, value])",
        tests=MODELS,
    ),
}


def verdict(copy: Path, tests: Sequence[str]) -> str:
    """Run tests of the copy up to the first failure; return pass, fail, hang, or what pytest could not do."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    process = subprocess.Popen(
        [*command, "-m", "not slow", *tests],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(copy), str(copy / "tools")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return "hang"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    words = {0: "pass", 1: "fail"}
    return words.get(process.returncode) or f"pytest ended with {process.returncode}:\n{said[-2000:]}"


def try_all(names: Sequence[str]) -> bool:
    """Plant every fault in a copy of the tree, one after the other; say whether all were noticed."""
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        copy = Path(folder).resolve()
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", ".*")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=ignored)
            else:
                shutil.copy(source, copy / name)
        for tests in dict.fromkeys(FAULTS[name].tests for name in names):
            unspoilt = verdict(copy, tests)
            if unspoilt != "pass":
                print(f"nothing is spoilt yet, and {' '.join(tests)} does not pass: {unspoilt}")
                return False
        noticed = 0
        for name in names:
            start, fault = time.monotonic(), FAULTS[name]
            spoilt = fault.applied(copy)
            originals = {path: path.read_text(encoding="utf-8") for path in spoilt}
            for path, text in spoilt.items():
                path.write_text(text, encoding="utf-8")
            found = verdict(copy, fault.tests)
            for path, text in originals.items():
                path.write_text(text, encoding="utf-8")
            word = {"pass": "MISSED", "fail": "noticed", "hang": "noticed by a hang"}.get(found, found)
            noticed += word.startswith("noticed")
            print(f"{word}: {name} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{noticed} of {len(names)} faults noticed")
    return noticed == len(names)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="NAME", choices=[*FAULTS], help="this one; repeat")
    start = time.monotonic()
    is_good = try_all(parser.parse_args().only or [*FAULTS])
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
