"""One call of a head loss on one rank, from what tests have at hand; its passes without a compiler."""

from __future__ import annotations

from tide_megatron.head.compiler import PassCompiler
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.loss import HeadLoss, HeadOptions


def evaluate(student, teachers, losses, rows, counts, clock, **options):
    """Evaluate losses on rows that no other rank shares; `options` are those of `HeadOptions`."""
    head = HeadLoss(losses, options=HeadOptions(**options))
    counts = {name: float(count) for name, count in counts.items()}
    return head(student, teachers, GatheredRows.alone(rows, counts), clock)


class Uncompiled(PassCompiler):
    """Calls the passes over a slab as they are: the same functions, without a compiler's minutes."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def run(self, function, options, *inputs):
        self.called.add(function.__name__)
        return function(*options, *inputs)
