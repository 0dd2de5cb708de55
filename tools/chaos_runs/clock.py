"""A time of day that can be moved for some processes only, by a library that they load first.

Debian's libfaketime does not serve: with its 0.9.10 `time.sleep` of Python 3.11 fails ("Invalid argument").
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
COMPILER = "cc"


def why_not() -> str | None:
    """Return why no clock can be moved here; None where one can."""
    return None if shutil.which(COMPILER) else f"a small C library needs a compiler ({COMPILER})"


class Clock:
    """The time of day of the processes that get its variables."""

    def __init__(self, folder: Path) -> None:
        """Build the library in a folder, which is made."""
        folder.mkdir()
        self._file, library = folder / "ahead", folder / "clock.so"
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        self.move(0)
        self.variables = {"LD_PRELOAD": str(library), "TIDE_CHAOS_CLOCK": str(self._file)}

    def move(self, seconds: int) -> None:
        """Set it so far ahead of this machine's."""
        with self._file.open("r+b" if self._file.exists() else "w+b") as file:
            file.write(struct.pack("<q", seconds))
