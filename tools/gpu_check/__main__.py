"""`make gpu-check` and `make gpu-rehearse`; `make gpu-bench` is the part `bench` (tools/bench/gpu_step.py).

    python -m gpu_check --assets .gpu --out FOLDER          on a machine with a GPU; needs torch, no network
    python -m gpu_check --assets .gpu --part correctness    one part alone; --only "NAME, NAME" some checks
    python -m gpu_check --part bench --json                 whole steps against the reference's way, goals
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
from collections import Counter
from pathlib import Path
from typing import Any

from bench.gpu_goals import BENCHES, judge
from gpu_check.checks import CHECKS, Check
from gpu_check.hidden import hide
from gpu_check.identity import ROOT, commit_of, read_identity, require_same
from gpu_check.pack import unpack
from gpu_check.rows import Place, Row
from gpu_check.runner import Plan, run_checks

PART_SECONDS = {"correctness": 240.0, "speed": 240.0, "bench": 290.0}
JOBS = {"correctness": 4, "speed": 1, "bench": 1}
BY_DEFAULT = ("correctness", "speed")
"""The parts of `make gpu-check`; a rehearsal makes all."""
REHEARSAL_JOBS = 2
SMALL_ASSETS = Check(name="assets", function="gpu_check.assets:make_small")
MARKS = {"passed": "ok", "failed": "FAILED", "missed": "missed", "not measured": "not measured"}


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
        if options.part != "bench":  # which compares with nothing that was recorded
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

        if options.rehearse and options.part != "bench":
            limit = time.monotonic() + PART_SECONDS["correctness"]
            run_checks([SMALL_ASSETS], Plan(place=place, logs=logs, jobs=1, deadline=limit), tell)
        for part, seconds in PART_SECONDS.items():
            chosen = [
                check for check in (*CHECKS, *BENCHES) if check.part == part and _is_wanted(check, options)
            ]
            plan = Plan(
                place=place,
                logs=logs,
                jobs=REHEARSAL_JOBS if options.rehearse else JOBS[part],
                deadline=time.monotonic() + seconds,
                is_ahead=part == "bench" and not options.rehearse,
            )
            began = time.monotonic()
            if chosen:
                found = run_checks(chosen, plan, tell)
                for row in judge(found, is_rehearsal=options.rehearse) if part == "bench" else ():
                    tell(row)
                print(f"{part}: {len(chosen)} checks in {time.monotonic() - began:.0f} s", flush=True)
    (options.out / "table.md").write_text(table(rows, _heading(options, rows)), encoding="utf-8")
    if options.json:
        print(json.dumps({"of": _heading(options, rows), "rows": [dataclasses.asdict(row) for row in rows]}))
    numbers = Counter(row.verdict for row in rows)
    told = ", ".join(f"{numbers[verdict]} {verdict}" for verdict in MARKS)
    print(f"rows: {told}: {options.out}")
    return 1 if numbers["failed"] or not rows else 0


def _is_wanted(check: Check, options: argparse.Namespace) -> bool:
    if options.rehearse and not check.rehearsed:
        return False
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    parts = tuple(PART_SECONDS) if options.rehearse else BY_DEFAULT
    is_part = check.part in parts if options.part == "all" else check.part == options.part
    return is_part and (not names or check.name in names)


def _heading(options: argparse.Namespace, rows: list[Row]) -> str:
    """Say on what was measured, and of which sources."""
    facts: dict[str, Any] = next((row.figures for row in rows if row.check == "facts"), {})
    facts = facts or next((row.figures["machine"] for row in rows if "machine" in row.figures), {})
    machine = ", ".join(str(facts[name]) for name in ("name", "torch", "megatron-core") if name in facts)
    is_own = options.rehearse or options.part == "bench"
    said = commit_of() if is_own else read_identity(options.assets)["commit"]
    other = "" if is_own else require_same(read_identity(options.assets), allowed=True)
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
    parser.add_argument("--part", choices=["all", *PART_SECONDS], default="all")
    parser.add_argument("--only", default="", help="names of checks, with commas between them")
    parser.add_argument(
        "--rehearse", action="store_true", help="run on a CPU, in small, with assets of its own"
    )
    parser.add_argument(
        "--other-commit", action="store_true", help="compare with assets of other sources all the same"
    )
    parser.add_argument("--json", action="store_true", help="also print all rows as one line of JSON")
    parser.add_argument("--list", action="store_true", help="list the checks and stop")
    parser.add_argument("--prepared", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        every = (*CHECKS, *BENCHES)
        print("\n".join(f"{check.part:12} {check.limit_seconds:4.0f} s  {check.name}" for check in every))
        raise SystemExit(0)
    return options


if __name__ == "__main__":
    sys.exit(main())
