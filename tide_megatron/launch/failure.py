"""How ranks fail, and which failure is the one to tell.

When one rank fails, the others fail after it: their connections close. The earliest failure that is not such
an echo is the cause. Nothing here needs torch, so the command line can name these errors without importing
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tide_megatron.base.errors import TideError


class RanksFailed(Exception):
    """A rank ended by a bug or a signal; the message names the rank and holds its traceback."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """How a rank failed: `error` for a fault of the user's, else `text` with the traceback."""

    rank: int
    at_seconds: float
    """Time of day; ranks of one machine share the clock, so the earliest is the cause."""
    text: str
    error: TideError | None = None
    is_echo: bool = False
    """Only the loss of another rank was seen."""


def first_failure(failures: Sequence[Failure], world_size: int) -> TideError | RanksFailed:
    """Choose the failure that caused the others, as the exception to raise.

    Args:
        failures: at least one; the lost connections that follow a failure are marked as echoes.
        world_size: ranks of the run.
    """
    first = min(failures, key=lambda failure: (failure.is_echo, failure.at_seconds))
    who = f"rank {first.rank} of {world_size}"
    if first.error is None:
        return RanksFailed(f"{who} failed first: {first.text}")
    everybody = sum(str(failure.error) == str(first.error) for failure in failures) == world_size
    return first.error if everybody else type(first.error)(f"{first.error} (seen by {who})")
