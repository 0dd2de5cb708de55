"""Starts `stage` where the package's other dependencies are not installed: python -I -S -B inside '{...}'.

The packages above this one import torch and more when they are imported. So this names their folders and
leaves their own code alone; what runs here imports the standard library and its neighbours.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def start() -> None:
    """Run `stage.main` with the instructions of the first argument."""
    package = ["tide_megatron", "tasks", "sandbox", "inside"]
    for depth in range(len(package)):
        name = ".".join(package[: depth + 1])
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(_HERE.parents[len(package) - 2 - depth] if depth < 3 else _HERE)]
    importlib.import_module(f"{'.'.join(package)}.stage").main(json.loads(sys.argv[1]))


if __name__ == "__main__":
    start()
