"""Spoil the code on purpose and see whether the tests notice.

    python tools/planted_faults.py [--only NAME]... [--mutations 50 --seed 1] [--json FILE]

First the planted faults of `faults/planted.yaml`: each is a mistake that somebody could make, with the tests
that must fail for it. Then, with --mutations, that many small random changes of operators and constants in
the layers that hold the arithmetic (`faults/mutations.yaml`), each against the unit tests of its file. All of
it happens in a private copy of the tree; before anything is spoilt, the tests must pass there.

The exit code is 0 only if every planted fault is caught, at least 90 % of the mutations are killed, and all
of the list still fits the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.mutations import Mutation, Plan, all_mutations, pick
from faults.planted import Fault, read_faults
from faults.sandbox import Outcome, Sandbox

LIMIT_SECONDS, PATIENCE = 60.0, 5
"""A spoilt run may take this long, or so many times as long as an unspoilt one on a busy machine."""
WANTED_SHARE = 0.9


def say(text: str) -> None:
    """Print one line at once, also into a file."""
    print(text, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A sandbox, and what its tests do when nothing is spoilt."""

    sandbox: Sandbox
    unspoilt: Outcome

    @classmethod
    def of(cls, sandbox: Sandbox, selections: Sequence[Sequence[str]]) -> Trial:
        """Run all tests of all selections once, unspoilt.

        Raises:
            SystemExit: some fail already, or a selection has none that runs.
        """
        tests = list(dict.fromkeys(test for selection in selections for test in selection))
        outcome = sandbox.run(tests, limit_seconds=1200.0, stop_at_first=False)
        empty = [test for test in tests if not outcome.passes(test)]
        if outcome.hung or outcome.red or empty:
            print(outcome.output, file=sys.stderr)
            raise SystemExit(
                f"nothing is spoilt yet, and this does not pass: {' '.join(outcome.red or empty)}"
            )
        say(f"{len(outcome.tests)} tests pass unspoilt, in {outcome.seconds:.0f} s")
        return cls(sandbox=sandbox, unspoilt=outcome)

    def spoil(self, file: str, text: str, tests: Sequence[str], *, stop_at_first: bool) -> Outcome:
        """Run tests with one file spoilt."""
        limit = max(LIMIT_SECONDS, PATIENCE * self.unspoilt.seconds_of(tests))
        with self.sandbox.spoilt(file, text):
            return self.sandbox.run(tests, limit_seconds=limit, stop_at_first=stop_at_first)


def try_faults(sandbox: Sandbox, faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """Plant every fault; return a record of each."""
    stale = [fault.name for fault in faults if fault.complaint(sandbox.path)]
    fitting = [fault for fault in faults if fault.name not in stale]
    trial = Trial.of(sandbox, [fault.tests for fault in fitting])
    records = []
    for fault in faults:
        start = time.monotonic()
        if fault.name in stale:
            verdict, missed = "stale", [fault.complaint(sandbox.path)]
        else:
            text = (sandbox.path / fault.file).read_text(encoding="utf-8")
            outcome = trial.spoil(fault.file, fault.applied(text), fault.tests, stop_at_first=False)
            missed = [] if outcome.hung else [test for test in fault.tests if not outcome.is_red(test)]
            verdict = "survived" if missed else "caught"
        seconds = time.monotonic() - start
        say(f"{verdict:9} {fault.name} ({seconds:.0f} s){''.join(f'; not red: {test}' for test in missed)}")
        records.append({"name": fault.name, "verdict": verdict, "missed": missed, "seconds": seconds})
    return records


def try_mutations(sandbox: Sandbox, plan: Plan, chosen: Sequence[Mutation]) -> list[dict[str, Any]]:
    """Try every mutation; return a record of each."""
    trial = Trial.of(sandbox, [plan.tests_of(mutation.file) for mutation in chosen])
    records = []
    for mutation in chosen:
        outcome = trial.spoil(mutation.file, mutation.text, plan.tests_of(mutation.file), stop_at_first=True)
        verdict = "hung" if outcome.hung else "killed" if outcome.red else "survived"
        say(f"{verdict:9} line {mutation.line} of {mutation.key} ({outcome.seconds:.0f} s)")
        records.append(
            {"name": mutation.key, "line": mutation.line, "verdict": verdict, "by": outcome.red[:1]}
        )
    return records


def select(faults: Sequence[Fault], names: Sequence[str]) -> list[Fault]:
    """Return the faults that were asked for by name; all without names."""
    unknown = set(names) - {fault.name for fault in faults}
    if unknown:
        raise SystemExit(f"no such planted fault: {', '.join(sorted(unknown))}; see faults/planted.yaml")
    return [fault for fault in faults if not names or fault.name in names]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", default=[], help="this planted fault; repeat"
    )
    parser.add_argument("--no-planted", action="store_true", help="mutations only")
    parser.add_argument("--mutations", type=int, default=0, metavar="N", help="how many mutations to try")
    parser.add_argument("--folder", action="append", metavar="DIR", help="mutate here only; repeat")
    parser.add_argument("--seed", type=int, default=1, help="which mutations (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all verdicts here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running tests end too
    faults = [] if options.no_planted else select(read_faults(), options.only)
    plan, start = Plan.read(), time.monotonic()
    planted, mutated = [], []
    with Sandbox() as sandbox:
        if faults:
            planted = try_faults(sandbox, faults)
        if options.mutations:
            everything = all_mutations(sandbox.path, options.folder or plan.folders)
            chosen = pick(everything, options.mutations, options.seed, plan.equivalent)
            mutated = try_mutations(sandbox, plan, chosen)
    caught = sum(record["verdict"] == "caught" for record in planted)
    killed = sum(record["verdict"] != "survived" for record in mutated)
    seconds = time.monotonic() - start
    say(f"\ncaught {caught} of {len(planted)} planted faults; killed {killed} of {len(mutated)} mutations")
    say(f"{seconds:.0f} s")
    if options.json:
        options.json.write_text(
            json.dumps(
                {"planted": planted, "mutations": mutated, "seed": options.seed, "seconds": seconds}, indent=1
            )
        )
    return 0 if caught == len(planted) and killed >= WANTED_SHARE * len(mutated) else 1


if __name__ == "__main__":
    sys.exit(main())
