"""`make gpu-check` and `make gpu-rehearse`.

    python -m gpu_check --assets .gpu --out FOLDER          on a machine with a GPU; needs torch, no network
    python -m gpu_check --assets .gpu --part correctness    one part alone; --only "NAME, NAME" some checks
    python -m gpu_check --rehearse                          without a GPU: small, gloo, makes its own assets

Writes `results.jsonl` (a line a row, as soon as it is known), `table.md` and `logs/` into FOLDER. Exit code
1: a check failed. What could not be measured is a row that says so. Standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_check.checks import CHECKS, Check
from gpu_check.hidden import hide
from gpu_check.identity import ROOT, commit_of, read_identity, require_same
from gpu_check.pack import unpack
from gpu_check.rows import Place, Row
from gpu_check.runner import Plan, run_checks

PART_SECONDS = 240.0
JOBS = {"correctness": 4, "speed": 1}
REHEARSAL_JOBS = 2
SMALL_ASSETS = Check(name="assets", function="gpu_check.assets:make_small")
MARKS = {"passed": "ok", "failed": "FAILED", "not measured": "not measured"}


def main() -> int:
    """Parse, prepare, run, report."""
    options = _parse()
    os.chdir(ROOT)  # recipes name the shipped models from there
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        if not options.prepared:
            return _again(options, Path(temporary))
        return _run(options, Path(temporary))


def _again(options: argparse.Namespace, folder: Path) -> int:
    """Start this program once more, where the path is what the checks' processes will have."""
    environment, engine = dict(os.environ), None
    tools = [str(ROOT), str(ROOT / "tools")]
    if options.rehearse:
        environment |= hide(folder)
        assets = options.assets
    else:
        assets = options.assets.resolve()
        require_same(read_identity(assets), allowed=options.other_commit)
        _require_gpu()
        paths, engine = unpack(assets / "pack", folder / "pack")
        tools = [*map(str, paths), *tools]
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [environment.get("PYTHONPATH")]), *tools])
    command = [sys.executable, "-m", "gpu_check", *sys.argv[1:], "--prepared", str(folder)]
    command += ["--engine", str(engine)] if engine else []
    return subprocess.run(command, env=environment, check=False).returncode


def _require_gpu() -> None:
    """Refuse a machine without a GPU in one sentence, instead of in every check."""
    probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode:
        raise SystemExit(
            f"{sys.executable} finds no torch with a usable GPU; name one that does (GPU_PYTHON=...), or "
            "rehearse without a GPU: make gpu-rehearse"
        )


def _run(options: argparse.Namespace, scratch: Path) -> int:
    """Run the parts and write what they found."""
    if options.rehearse:
        os.environ["OMP_NUM_THREADS"] = "1"
        options.assets = Path(options.prepared) / "assets"
    place = Place(
        device="cpu" if options.rehearse else "cuda",
        assets=options.assets.resolve(),
        scratch=scratch,
        transformer_engine=Path(options.engine) if options.engine else None,
    )
    logs = options.out.resolve() / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    rows: list[Row] = []
    with (options.out / "results.jsonl").open("w", encoding="utf-8") as file:

        def tell(row: Row) -> None:
            rows.append(row)
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            file.flush()
            print(f"{MARKS[row.verdict]:12} {row.check:24} {row.seconds:6.1f} s  {row.text}", flush=True)

        if options.rehearse:
            limit = time.monotonic() + PART_SECONDS
            run_checks([SMALL_ASSETS], Plan(place=place, logs=logs, jobs=1, deadline=limit), tell)
        for part in ("correctness", "speed"):
            chosen = [check for check in CHECKS if check.part == part and _is_wanted(check, options)]
            jobs = REHEARSAL_JOBS if options.rehearse else JOBS[part]
            plan = Plan(place=place, logs=logs, jobs=jobs, deadline=time.monotonic() + PART_SECONDS)
            began = time.monotonic()
            if chosen:
                run_checks(chosen, plan, tell)
                print(f"{part}: {len(chosen)} checks in {time.monotonic() - began:.0f} s", flush=True)
    (options.out / "table.md").write_text(table(rows, _heading(options, rows)), encoding="utf-8")
    failed = [row for row in rows if row.verdict == "failed"]
    missing = sum(row.verdict == "not measured" for row in rows)
    passed = len(rows) - len(failed) - missing
    print(f"{passed} rows passed, {len(failed)} failed, {missing} not measured: {options.out}")
    return 1 if failed or not rows else 0


def _is_wanted(check: Check, options: argparse.Namespace) -> bool:
    if options.rehearse and not check.rehearsed:
        return False
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    return options.part in ("all", check.part) and (not names or check.name in names)


def _heading(options: argparse.Namespace, rows: list[Row]) -> str:
    """Say on what was measured, and of which sources."""
    facts: dict[str, Any] = next((row.figures for row in rows if row.check == "facts"), {})
    machine = ", ".join(str(facts[name]) for name in ("name", "torch", "megatron-core") if name in facts)
    said = commit_of() if options.rehearse else read_identity(options.assets)["commit"]
    other = "" if options.rehearse else require_same(read_identity(options.assets), allowed=True)
    return f"{machine or 'machine unknown'}; commit {said}" + (f" ({other})" if other else "")


def table(rows: list[Row], heading: str) -> str:
    """Return the rows as a Markdown table."""
    lines = [f"{heading}\n", "| check | | seen | s |", "|---|---|---|--:|"]
    for row in rows:
        text = row.text.replace("|", "/").replace("\n", " ")
        lines.append(f"| {row.check} | {MARKS[row.verdict]} | {text} | {row.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=ROOT / ".gpu", help="what `make gpu-assets` made")
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu-results", help="where results go")
    parser.add_argument("--part", choices=["all", "correctness", "speed"], default="all")
    parser.add_argument("--only", default="", help="names of checks, with commas between them")
    parser.add_argument(
        "--rehearse", action="store_true", help="run on a CPU, in small, with assets of its own"
    )
    parser.add_argument(
        "--other-commit", action="store_true", help="compare with assets of other sources all the same"
    )
    parser.add_argument("--list", action="store_true", help="list the checks and stop")
    parser.add_argument("--prepared", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{check.part:12} {check.limit_seconds:4.0f} s  {check.name}" for check in CHECKS))
        raise SystemExit(0)
    return options


if __name__ == "__main__":
    sys.exit(main())
