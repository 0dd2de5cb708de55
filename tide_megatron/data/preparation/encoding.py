"""Sources on their way through the processes that encode: what needs no encoding comes back in its place."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

from tide_megatron.base.errors import RecordError
from tide_megatron.data.preparation.parallel_encoder import Encoding, ParallelEncoder
from tide_megatron.data.preparation.sample import Sample
from tide_megatron.data.sources.opening import ChatSource
from tide_megatron.data.sources.source import Line

_MOST_ASIDE = 50_000
"""So many rows in a row may be left out before what is being encoded is waited for: memory has an end."""


def encoded(
    source: ChatSource, lines: Iterable[Line], workers: ParallelEncoder
) -> Iterator[tuple[int, Encoding]]:
    """Yield (number, outcome) of a source's rows in their order.

    Args:
        source: whose filters on tokens count.
        lines: its own.
        workers: what encodes.

    Raises:
        DataError: no record can be encoded, or the source cannot be read.
    """
    remaining = iter(lines)
    aside: collections.deque[tuple[int, RecordError | str]] = collections.deque()
    is_open = True

    def whole() -> Iterator[tuple[int, bytes]]:
        nonlocal is_open
        for number, line in remaining:
            if isinstance(line, bytes):
                yield number, line
                continue
            aside.append((number, line))
            if len(aside) >= _MOST_ASIDE:
                return
        is_open = False

    while is_open:
        for number, (found, said) in workers.encode(whole()):
            while aside and aside[0][0] < number:
                place, reason = aside.popleft()
                yield place, (reason, None)
            short = source.sample_left_out(len(found.row["ids"])) if isinstance(found, Sample) else None
            yield number, (found if short is None else short, said)
        while aside:
            place, reason = aside.popleft()
            yield place, (reason, None)
