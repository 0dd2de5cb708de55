"""The checks, in the order of their value. Standard library only: the parent process never imports torch."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal

from gpu_check.rows import Place, Row

Part = Literal["correctness", "speed", "bench"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One process: a function that is given a `Place` and arguments, and returns rows."""

    name: str
    function: str
    """`module:function`."""
    arguments: tuple[Any, ...] = ()
    part: Part = "correctness"
    limit_seconds: float = 150.0
    """It is ended then, with all that it started."""
    rehearsed: bool = True
    """Whether a rehearsal makes it too; one of several that differ by a word is enough there."""
    with_engine: bool = False
    """Transformer Engine is on its path, where the pack brought one: megatron-core takes it then."""

    def load(self) -> Callable[..., list[Row]]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., list[Row]] = getattr(importlib.import_module(module), name)
        return function

    def rows(self, place: Place) -> list[Row]:
        """Make the check in this process.

        Raises:
            NotMeasured: it cannot be made here.
        """
        return self.load()(place, *self.arguments)


def _steps(run: str, attention: str, form: str, **options: Any) -> Check:
    name = f"{run} {attention} {form}" + (" TE" if options.get("with_engine") else "")
    return Check(
        name=name, function="gpu_check.training:check_steps", arguments=(run, attention, form), **options
    )


CHECKS = (
    Check(name="facts", function="gpu_check.machine:check_facts", limit_seconds=60),
    _steps("cross", "dense", "plain"),
    _steps("shared", "flex", "fused"),
    Check(name="attention", function="gpu_check.attention:check_kernels", limit_seconds=150),
    Check(name="ranks", function="gpu_check.ranks:check_ranks", limit_seconds=200),
    _steps("cross", "flex", "fused"),
    _steps("shared", "dense", "fused"),
    Check(name="quickstart bf16", function="gpu_check.training:check_quickstart", limit_seconds=180),
    Check(name="resume", function="gpu_check.resume:check_resume", limit_seconds=150),
    _steps("cross", "dense", "fused"),
    _steps("shared", "dense", "plain", rehearsed=False),
    _steps("cross", "flex", "plain", rehearsed=False),
    _steps("shared", "flex", "plain", rehearsed=False),
    _steps("shared", "dense", "fused", with_engine=True, rehearsed=False),
    Check(name="engines", function="gpu_check.engines:check_own", limit_seconds=120),
    Check(
        name="engines TE",
        function="gpu_check.engines:check_te",
        limit_seconds=150,
        with_engine=True,
        rehearsed=False,
    ),
    Check(name="doctor", function="gpu_check.machine:check_doctor", limit_seconds=90, rehearsed=False),
    Check(name="pack", function="gpu_check.machine:check_pack", limit_seconds=150, with_engine=True),
    Check(name="step speed", function="gpu_check.step_speed:check_step", part="speed", limit_seconds=120),
    Check(name="head speed", function="gpu_check.head_speed:check_head", part="speed", limit_seconds=110),
    Check(name="attention speed", function="gpu_check.attention:check_speed", part="speed", limit_seconds=90),
)
