"""What became of one fault, and the looks at a run that every kind of fault takes."""

from __future__ import annotations

import dataclasses
import re
import time

from chaos_runs.starts import EVERY, RUN_SECONDS, Site, Start


@dataclasses.dataclass(kw_only=True)
class Seen:
    """What became of one fault."""

    number: int
    kind: str
    limit: float
    """So many seconds may pass until it is noticed."""
    what: str = ""
    """Which rank, node or file, and when."""
    noticed: float | None = None
    """Seconds from the fault to the words; of what is found at a start, from the command."""
    words: str = ""
    lost: int = 0
    """Updates that were done again."""
    passed_over: int = 0
    """Updates whose samples were passed over, as the log said."""
    is_equal: bool | None = None
    """Whether losses, gradient norms, scores and the student's bytes are those of the undisturbed run."""
    wrong: str = ""
    """Empty: it was handled."""
    seconds: float = 0.0

    def notice(self, start: Start, pattern: str, since: float, node: int | None = None) -> str:
        """Wait for words; note when they came."""
        line = start.says(pattern, self.limit + 30.0, node)
        self.noticed = max(self.noticed or 0.0, time.monotonic() - since)
        assert line, f"no words like {pattern!r} within {self.limit + 30:g} s:\n{start.said()[-3000:]}"
        self.words = line.strip()
        assert self.noticed <= self.limit, (
            f"noticed after {self.noticed:.1f} s, the limit is {self.limit:g} s"
        )
        return line


def ended(start: Start, *codes: int, seconds: float = 60.0) -> None:
    """See that all launchers of a start end with one of some codes."""
    got = start.ends(seconds)
    assert all(code in codes for code in got), f"exit codes {got}, not {codes}:\n{start.said()[-3000:]}"


def goes_on(site: Site, seen: Seen, before: int, limit: int = EVERY) -> Start:
    """Give the same command again, see it go on from where it says to the end.

    Args:
        site: the run.
        seen: what is filled in.
        before: the last update of the start before.
        limit: so many updates may be lost.
    """
    start = site.start()
    ended(start, 0, seconds=RUN_SECONDS)
    at, seen.lost = resumed(start)
    # An update may have been applied and not yet been recorded, never the other way round.
    assert 0 <= at + seen.lost - before <= 1, f"{seen.lost} lost before {at}, but {before} was recorded"
    assert seen.lost <= limit, f"{seen.lost} updates lost, more than {limit}"
    return start


def resumed(start: Start) -> tuple[int, int]:
    """Return where a start says that it went on from, and how many updates it says were lost."""
    found = re.search(r"resumed from step (\d+), lost (\w+) steps?,", start.said())
    assert found, f"it did not go on from a checkpoint:\n{start.said()[-3000:]}"
    return int(found[1]), 0 if found[2] == "no" else int(found[2])
