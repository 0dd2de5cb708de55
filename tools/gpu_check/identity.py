"""What the assets belong to: a commit, and a digest of every file that decides what a check must give.

A machine that gets a copy of the working tree may have no .git, so the digest is what is compared.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DECIDING = ("tide_megatron/**/*.py", "tools/gpu_check/**/*.yaml", "examples/*/models/*/*")
FILE = "assets.json"


def digest_of(root: Path = ROOT) -> str:
    """Return the digest of the files that decide what a run gives."""
    total = hashlib.sha256()
    for pattern in DECIDING:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def commit_of(root: Path = ROOT) -> str:
    """Return the commit of a checkout, with + where files differ from it; `unknown` without git."""
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def read_identity(assets: Path) -> dict[str, Any]:
    """Read what assets say of themselves.

    Raises:
        SystemExit: there are none, or they were made of other sources; with one sentence.
    """
    file = assets / FILE
    if not file.is_file():
        raise SystemExit(
            f"{assets}: no assets there; run `make gpu-assets` on a CPU machine and bring the folder along"
        )
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def require_same(found: dict[str, Any], *, allowed: bool) -> str:
    """Refuse assets of another commit, or say that they are.

    Args:
        found: what the assets say.
        allowed: go on all the same.

    Raises:
        SystemExit: they were made of other sources; with one sentence.
    """
    here = digest_of()
    if found["digest"] == here:
        return ""
    sentence = (
        f"the assets were made of commit {found['commit']} (sources {found['digest']}), this checkout is "
        f"{commit_of()} (sources {here})"
    )
    if not allowed:
        raise SystemExit(
            f"{sentence}; run `make gpu-assets` again, or give --other-commit to compare all the same"
        )
    return sentence
