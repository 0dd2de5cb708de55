"""Packages that the assets bring to a machine without a network: unpacked into folders for the path.

megatron-core takes Transformer Engine as soon as it can import it, so that is kept in a folder of its own:
most checks run without it, as our engine does today, and some with it. Standard library only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ENGINE = "te-core,te-torch"


def unpack(pack: Path, folder: Path) -> tuple[list[Path], Path | None]:
    """Unpack a pack.

    Args:
        pack: the pack's folder; it may be missing.
        folder: where to.

    Returns:
        What belongs on everybody's path, and Transformer Engine's folder where the pack has it.

    Raises:
        SystemExit: it is damaged.
    """
    if not (pack / "unpack.py").is_file():
        return [], None
    _run(pack, folder / "packages", "python")
    _run(pack, folder / "engine", ENGINE)
    has_engine = any((folder / "engine").glob("transformer_engine*"))
    return [folder / "packages"], folder / "engine" if has_engine else None


def _run(pack: Path, folder: Path, archives: str) -> None:
    command = [sys.executable, str(pack / "unpack.py"), str(folder), "--only", archives]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not folder.is_dir():
        raise SystemExit(f"{pack}: {done.stderr.strip().splitlines()[-1:]}; make the assets again")
