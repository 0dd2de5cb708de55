"""Which rank does what: the arithmetic of one model's layout, without torch and without processes.

A world of W ranks holds several models at once, each with a layout of its own. **Replicas are contiguous**
(design section 1): rank = t + T * (p + P * d), tensor fastest, then pipeline, then data, so every replica
is an aligned block of ranks. Experts are spread over the ranks of one pipeline *stage* (all its tensor and
data ranks, ascending): over that list expert_tensor is fastest, then expert, then expert-data. A stage is
not contiguous when P > 1, which is why every group is an explicit list of ranks here and never a factored
grid.

`check` refuses what cannot work before any process group exists, and names the nearest layout that can.
Left out: context parallelism (each rank is its own context group) and the interleaved pipeline schedule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from tide_megatron.base.errors import ConfigError

RankList = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coordinates:
    """A rank's coordinates in a layout."""

    tensor: int
    pipeline: int
    data: int
    """Which replica."""
    index: int
    """Place inside the replica, 0 .. tensor * pipeline - 1: whose turn it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataShard:
    """Which part of the data a rank reads; all ranks of a replica read the same part."""

    rank: int = 0
    """0 .. size - 1."""
    size: int = 1
    """Number of parts: replicas of the model that reads them."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"part {self.rank} of {self.size}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankLists:
    """All groups of one layout; the lists of one field are disjoint and stand in a fixed order.

    Every field covers the whole world, except the two embedding fields, which leave out middle stages.
    """

    tensor: tuple[RankList, ...]
    """Ranks that cut the same matrices."""
    pipeline: tuple[RankList, ...]
    """Ranks that hold consecutive stages."""
    data: tuple[RankList, ...]
    """Ranks that hold the same dense weights and different samples."""
    replica: tuple[RankList, ...]
    """One full copy of the dense model: tensor x pipeline."""
    stage: tuple[RankList, ...]
    """All ranks of a pipeline stage: tensor x data."""
    expert: tuple[RankList, ...]
    """Ranks that hold different experts of the same layers."""
    expert_tensor: tuple[RankList, ...]
    """Ranks that cut the same experts."""
    expert_block: tuple[RankList, ...]
    """One full set of a stage's experts: expert_tensor x expert."""
    expert_data: tuple[RankList, ...]
    """Ranks that hold the same experts."""
    expert_replica: tuple[RankList, ...]
    """One full set of all layers' experts: expert_block x pipeline."""
    embedding: tuple[RankList, ...]
    """Ranks that hold copies of a tied embedding: first and last stage."""
    position_embedding: tuple[RankList, ...]
    """First-stage ranks, alone."""
    alone: tuple[RankList, ...]
    """Every rank by itself (axes that are not cut)."""
    world: tuple[RankList, ...]
    """One list of all ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ways each axis of a model is cut. Data parallelism is what remains of the world."""

    tensor: int = 1
    """Ranks that share each matrix of a layer."""
    pipeline: int = 1
    """Stages of consecutive layers, a rank (or `tensor` ranks) each."""
    expert: int = 1
    """Ranks over which the experts of a mixture layer are spread."""
    expert_tensor: int = 1
    """Ranks that share each expert's matrices."""

    @property
    def replica_size(self) -> int:
        """Return how many ranks hold one copy of the dense model."""
        return self.tensor * self.pipeline

    def num_replicas(self, world: int) -> int:
        """Return the data-parallel size in a world of `world` ranks."""
        return world // self.replica_size

    def replicas(self, world: int) -> tuple[RankList, ...]:
        """Return the ranks of each replica, in order."""
        size = self.replica_size
        return tuple(tuple(range(first, first + size)) for first in range(0, world, size))

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        """Return how many of a model's layers each pipeline stage has.

        The stages between the first and the last have equally many, which is what megatron-core can express;
        of these splits the one whose longest stage is shortest, and of equal ones the one with the shortest
        ends, which hold embedding or final norm beside layers. An odd layer goes to the first stage.

        Args:
            layers: of the whole model; at least one for each stage (`check`).
        """
        middle_stages = self.pipeline - 2
        if middle_stages < 0:
            return (layers,)

        def split(middle: int) -> tuple[int, ...]:
            ends = layers - middle_stages * middle
            return (ends - ends // 2, *[middle] * middle_stages, ends // 2)

        most = (layers - 2) // middle_stages if middle_stages else 1
        return min((split(middle) for middle in range(most, 0, -1)), key=max)

    def rank(self, *, tensor: int = 0, pipeline: int = 0, data: int = 0) -> int:
        """Return the rank at these coordinates."""
        return tensor + self.tensor * (pipeline + self.pipeline * data)

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of `rank`; the inverse of `rank`."""
        data, index = divmod(rank, self.replica_size)
        pipeline, tensor = divmod(index, self.tensor)
        return Coordinates(tensor=tensor, pipeline=pipeline, data=data, index=index)

    def data_shard(self, rank: int, world: int) -> DataShard:
        """Return the part of the data that `rank` reads in a world of `world` ranks: its replica's."""
        return DataShard(rank=self.coordinates(rank).data, size=self.num_replicas(world))

    def rank_lists(self, world: int) -> RankLists:
        """Return every group of this layout in a world of `world` ranks; the layout must fit (`check`)."""
        tensors, pipelines, replicas = (
            range(self.tensor),
            range(self.pipeline),
            range(self.num_replicas(world)),
        )

        def at(tensor: int, pipeline: int, data: int) -> int:
            return self.rank(tensor=tensor, pipeline=pipeline, data=data)

        columns = [(t, d) for d in replicas for t in tensors]  # the places of one stage, ascending by rank
        stage = [tuple(at(t, p, d) for t, d in columns) for p in pipelines]
        cuts = [_ExpertCut.of(ranks, self) for ranks in stage]
        first = [at(t, 0, d) for t, d in columns]
        last = [at(t, self.pipeline - 1, d) for t, d in columns]
        return RankLists(
            tensor=tuple(tuple(at(t, p, d) for t in tensors) for d in replicas for p in pipelines),
            pipeline=tuple(tuple(at(t, p, d) for p in pipelines) for t, d in columns),
            data=tuple(tuple(at(t, p, d) for d in replicas) for p in pipelines for t in tensors),
            replica=self.replicas(world),
            stage=tuple(stage),
            expert=tuple(ranks for cut in cuts for ranks in cut.expert),
            expert_tensor=tuple(ranks for cut in cuts for ranks in cut.expert_tensor),
            expert_block=tuple(ranks for cut in cuts for ranks in cut.block),
            expert_data=tuple(ranks for cut in cuts for ranks in cut.data),
            expert_replica=tuple(
                tuple(sorted(sum(blocks, ()))) for blocks in zip(*(cut.block for cut in cuts), strict=True)
            ),
            embedding=tuple(tuple(sorted({a, b})) for a, b in zip(first, last, strict=True)),
            position_embedding=tuple((rank,) for rank in first),
            alone=tuple((rank,) for rank in range(world)),
            world=(tuple(range(world)),),
        )

    def check(
        self,
        world: int,
        *,
        heads: int | None = None,
        groups: int | None = None,
        experts: int | None = None,
        layers: int | None = None,
    ) -> None:
        """Refuse a layout that cannot work; call it before any process group is made.

        Args:
            world: number of ranks.
            heads: attention heads of the model; None, here and below, skips what is not known yet.
            groups: key-value heads (query groups).
            experts: routed experts of an MoE layer; 0 for a dense model.
            layers: transformer layers.

        Raises:
            ConfigError: with the reason and the nearest layout that is legal for these numbers.
        """
        shape = _Shape(world=world, heads=heads, groups=groups, experts=experts, layers=layers)
        reason = shape.objection(self)
        if reason is not None:
            raise ConfigError(f"layout {self}: {reason}; the nearest legal layout is {shape.nearest(self)}")

    def __str__(self) -> str:
        """Write the layout as in a recipe, leaving out uncut axes."""
        cut = [f"{field}={size}" for field, size in dataclasses.asdict(self).items() if size != 1]
        return f"{{{', '.join(cut)}}}" if cut else "{tensor=1} (data-parallel only)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExpertCut:
    """How one stage's ranks share its experts: place = expert_tensor + ET * (expert + E * data)."""

    expert: list[RankList]
    expert_tensor: list[RankList]
    block: list[RankList]
    data: list[RankList]

    @staticmethod
    def of(stage: RankList, layout: Layout) -> _ExpertCut:
        slices, block = layout.expert_tensor, layout.expert_tensor * layout.expert
        blocks = [stage[start : start + block] for start in range(0, len(stage), block)]
        return _ExpertCut(
            expert=[ranks[t::slices] for ranks in blocks for t in range(slices)],
            expert_tensor=[ranks[e : e + slices] for ranks in blocks for e in range(0, block, slices)],
            block=blocks,
            data=[stage[place::block] for place in range(block)],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """The numbers a layout must fit; None is not known and not checked."""

    world: int
    heads: int | None
    groups: int | None
    experts: int | None
    layers: int | None

    def objection(self, layout: Layout) -> str | None:
        """Say why the layout does not fit, or None."""
        for axis, size in dataclasses.asdict(layout).items():
            if not isinstance(size, int) or size < 1:
                return f"{axis}={size!r} must be a whole number, at least 1"
        return self._dense_objection(layout) or self._expert_objection(layout)

    def _dense_objection(self, layout: Layout) -> str | None:
        if self.world % layout.replica_size:
            return (
                f"a replica takes tensor x pipeline = {layout.replica_size} ranks, "
                f"which does not divide the {self.world} ranks of this run"
            )
        for count, name in ((self.heads, "attention heads"), (self.groups, "key-value heads")):
            if count is not None and count % layout.tensor:
                return f"{count} {name} cannot be shared evenly by tensor={layout.tensor} ranks"
        if self.layers is not None and self.layers < layout.pipeline:
            return f"{self.layers} layers are too few for pipeline={layout.pipeline} stages"
        return None

    def _expert_objection(self, layout: Layout) -> str | None:
        block = layout.expert * layout.expert_tensor
        if self.experts == 0 and block > 1:
            return (
                f"expert={layout.expert}, expert_tensor={layout.expert_tensor} but the model has no experts"
            )
        if self.experts is not None and self.experts % layout.expert:
            return f"{self.experts} experts cannot be shared evenly by expert={layout.expert} ranks"
        stage = self.world // layout.pipeline
        if stage % block:
            return (
                f"experts take expert x expert_tensor = {block} ranks of one pipeline stage, "
                f"which does not divide the {stage} ranks it has"
            )
        return None

    def nearest(self, wanted: Layout) -> Layout:
        """Return the legal layout with the fewest doublings and halvings from the wanted one.

        Among equals: fewer changed axes, then the smaller replica. `Layout()` is always legal.
        """

        def distance(layout: Layout) -> tuple[float, int, int, tuple[int, ...]]:
            pairs = list(zip(dataclasses.astuple(layout), dataclasses.astuple(wanted), strict=True))
            steps = sum(abs(math.log2(have) - math.log2(max(1, want))) for have, want in pairs)
            changed = sum(have != want for have, want in pairs)
            return round(steps, 9), changed, layout.replica_size, dataclasses.astuple(layout)

        return min(self._legal(), key=distance)

    def _legal(self) -> Iterator[Layout]:
        for replica in _divisors(self.world):
            for tensor in _divisors(replica):
                stage = self.world // (replica // tensor)
                for block in _divisors(stage):
                    for expert in _divisors(block):
                        layout = Layout(
                            tensor=tensor,
                            pipeline=replica // tensor,
                            expert=expert,
                            expert_tensor=block // expert,
                        )
                        if self.objection(layout) is None:
                            yield layout


def legal_layouts(world: int, *, heads: int, groups: int, experts: int, layers: int) -> Iterator[Layout]:
    """Yield every layout that `Layout.check` lets pass for these numbers, the smallest replicas first.

    Args:
        world: ranks.
        heads: attention heads.
        groups: key-value heads.
        experts: of a mixture layer; 0: there are none.
        layers: transformer layers.
    """
    return _Shape(world=world, heads=heads, groups=groups, experts=experts, layers=layers)._legal()


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
