"""Find Transformer Engine before megatron-core does, and hide it where it cannot be used.

megatron-core imports Transformer Engine wherever it is installed and expects nothing worse than an
ImportError. One that was installed on a machine without a driver raises OSError (it loads `libcuda.so.1`),
one built for another torch raises whatever its C++ symbols lead to, and either would end every import of
megatron-core. Where it does import but no GPU computes, megatron-core would take its optimizer and kernels
and fail at their first use. So it is tried here, once, and where it is of no use it is hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import sys

import torch

from tide_megatron.base.errors import last_line

MODULE = "transformer_engine"
_DISTRIBUTIONS = ("transformer-engine", "transformer_engine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerEngine:
    """What of Transformer Engine this process has."""

    version: str = ""
    """Empty where it is not installed; `of unknown version` where nothing says."""
    fault: str = ""
    """Why it is not used, to be read after its name: "is not installed"; empty: megatron-core has it."""

    @property
    def is_installed(self) -> bool:
        """Whether there is something to import, whatever comes of it."""
        return bool(self.version)

    @property
    def is_usable(self) -> bool:
        """Whether megatron-core builds layers of it here."""
        return not self.fault

    def __str__(self) -> str:
        """Name it with its version, and what is wrong with it."""
        return " ".join(part for part in ("Transformer Engine", self.version, self.fault) if part)


@functools.cache
def find_transformer_engine() -> TransformerEngine:
    """Try Transformer Engine, and hide it from all later imports where it is of no use here.

    Must come before the first import of megatron-core (`platform.prepare_platform` sees to it); later calls
    return the first answer.
    """
    if MODULE not in sys.modules and importlib.util.find_spec(MODULE) is None:
        return TransformerEngine(fault="is not installed")
    version, fault = _version(), ""
    if torch.cuda.device_count() == 0:
        fault = "is installed, but this process has no CUDA device"
    else:
        try:
            importlib.import_module(f"{MODULE}.pytorch")
        except Exception as error:  # native libraries raise anything
            fault = f"is installed, but does not import ({last_line(error)})"
    if fault:
        _hide()
    return TransformerEngine(version=version, fault=fault)


def _hide() -> None:
    """Make every later import of it the ImportError that megatron-core expects."""
    for name in [name for name in sys.modules if name.partition(".")[0] == MODULE]:
        del sys.modules[name]  # what a failing import has left
    sys.modules[MODULE] = None  # type: ignore[assignment]


def _version() -> str:
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "of unknown version"
