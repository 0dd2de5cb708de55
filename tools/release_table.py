"""A table of what releases of other projects have, read from their sources: compare with it, or record."""

import argparse
import json
from pathlib import Path


def compare_or_record(words, purpose, table, read, differences):
    """Run a tool's command; return the exit code, 1 where a release differs from the table.

    Args:
        words: of the command line; None: those of the process.
        purpose: the tool's docstring.
        table: JSON file, release -> facts.
        read: (folder, release) -> facts.
        differences: (recorded facts, facts) -> lines.
    """
    parser = argparse.ArgumentParser(description=purpose.splitlines()[0])
    parser.add_argument("release", help="name and version, as in the table")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(words)
    found = read(given.folder, given.release)
    recorded = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
    if given.write:
        recorded[given.release] = found
        table.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    lines = differences(recorded.get(given.release, {}), found)
    print("\n".join(lines) or "as in the table")
    return bool(lines)
