"""How far a program that a model wrote may go, and what keeps it there."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.options import STRICT

Kind = Literal["namespaces", "bubblewrap", "filters", "none"]
Isolation = Literal["auto", "namespaces", "bubblewrap", "filters", "none"]
"""`auto`: the first of the others that works here, but never `none`, which has to be named."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Limits:
    """What one process gets; a program is one process of one thread."""

    cpu_seconds: int = Field(default=10, ge=1)
    """Processor time, the interpreter's start included."""
    wall_seconds: float = Field(default=60.0, gt=0.0)
    """Time by the clock from where the interpreter stands ready: for programs that wait. Well above
    `cpu_seconds`, so that a busy machine does not fail a program that is right."""
    memory_mib: int = Field(default=512, ge=64)
    """Address space."""
    work_mib: int = Field(default=16, ge=1)
    """Room of the working folder, which lies in memory; only `namespaces` has one."""
    work_files: int = Field(default=1000, ge=1)
    """Files in it."""
    open_files: int = Field(default=64, ge=16)
    """Open at once."""
    output_characters: int = Field(default=65536, ge=0)
    """Kept of what one run prints; a program that prints more fails."""
