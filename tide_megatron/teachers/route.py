"""The way of one teacher's rows: from the last stage of each replica to every rank of the head group.

Inside a replica they are broadcast from its last stage; across the replicas of a head group, ranks of one
seat gather them. A teacher whose replica is one rank has the second step only, and none at all where the head
group is one rank too. Per receiver that is [rows, hidden size], never logits (design section 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.parallel.exchange import broadcast_rows, gather_parts
from tide_megatron.parallel.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """Where this rank stands between one teacher's replicas and its head group."""

    layout: Layout
    """The teacher's."""
    replica: ProcessGroup
    across: ProcessGroup | None
    """This head group's ranks of the same seat, one per replica; None: there is one replica."""
    rank: int = 0
    """This rank's number in its vocabulary group, which consists of whole replicas."""

    @property
    def seats(self) -> range:
        """The places in the head group of this rank's replica."""
        size = self.layout.replica_size
        first = self.rank // size * size
        return range(first, first + size)

    @property
    def is_alone(self) -> bool:
        """Whether a rank forwards for itself, without seats to collect from."""
        return self.layout.replica_size == 1

    def deliver(self, rows: Tensor, seat_rows: Sequence[int]) -> Tensor:
        """Bring the rows of all replicas to every rank. All ranks of the head group call it together.

        Args:
            rows: [rows of this replica, hidden size] in the order of seats; what a rank before the last stage
                passes is overwritten.
            seat_rows: how many rows each place of the head group asked for.

        Returns:
            [sum of seat_rows, hidden size], in the order of places.
        """
        size = self.layout.replica_size
        if size > 1:
            last_stage = self.layout.tensor * (self.layout.pipeline - 1)  # its first tensor rank
            rows = broadcast_rows(rows.contiguous(), last_stage, self.replica)
        if self.across is None:
            return rows
        parts = [sum(seat_rows[first : first + size]) for first in range(0, len(seat_rows), size)]
        return gather_parts(rows, parts, self.across, "deliver")
