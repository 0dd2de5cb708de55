"""One call of a head loss on one rank, from what tests have at hand."""

from __future__ import annotations

from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.loss import HeadLoss, HeadOptions


def evaluate(student, teachers, losses, rows, counts, clock, **options):
    """Evaluate losses on rows that no other rank shares; `options` are those of `HeadOptions`."""
    head = HeadLoss(losses, options=HeadOptions(**options))
    counts = {name: float(count) for name, count in counts.items()}
    return head(student, teachers, GatheredRows.alone(rows, counts), clock)
