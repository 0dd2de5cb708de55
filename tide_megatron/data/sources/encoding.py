"""Sources on their way through the processes that encode: faults and left-out samples in their places."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

from tide_megatron.base.errors import RecordError
from tide_megatron.data.parallel_encoder import Outcome, ParallelEncoder
from tide_megatron.data.sample import Sample
from tide_megatron.data.source import Line
from tide_megatron.data.sources.opening import ChatSource


def encoded(
    source: ChatSource, lines: Iterable[Line], workers: ParallelEncoder
) -> Iterator[tuple[int, Outcome]]:
    """Yield (number, outcome) of a source's rows in their order.

    Args:
        source: whose filters on tokens count.
        lines: its own.
        workers: what encodes.

    Raises:
        DataError: no record can be encoded, or the source cannot be read.
    """
    faults: collections.deque[tuple[int, RecordError]] = collections.deque()

    def whole() -> Iterator[tuple[int, bytes]]:
        for number, line in lines:
            if isinstance(line, RecordError):
                faults.append((number, line))
            else:
                yield number, line

    for number, (found, said) in workers.encode(whole()):
        while faults and faults[0][0] < number:
            place, fault = faults.popleft()
            yield place, (fault, None)
        reason = source.sample_left_out(len(found.row["ids"])) if isinstance(found, Sample) else None
        yield number, (found if reason is None else reason, said)
    for number, fault in faults:
        yield number, (fault, None)
