"""The layouts that a recipe could have on some ranks, and what can be said of each without a step.

Two formulas, neither of which is shown as a result. `least_bytes` counts weights, gradients, masters and
moments of the fullest rank and nothing else, so it never says more than a step needs: what exceeds the card
by it is out. `score` weighs arithmetic, what travels and pipeline bubbles, roughly: it decides which of the
rest are recorded first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import tide_megatron.platform
from tide_megatron.platform.lone_world import PlannedDevice

from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.mask import Context
from tide_megatron.models.architecture import Architecture, body_flops
from tide_megatron.models.build import check_widths
from tide_megatron.models.precision import Precision
from tide_megatron.models.shard import Shard
from tide_megatron.parallel.layout import Layout, legal_layouts
from tide_megatron.parallel.vocab_group import VocabGroup, vocab_group_size
from tide_megatron.plan.weights import weight_bytes
from tide_megatron.train.models import ModelShape, check_layout
from tide_megatron.train.recipe import Recipe, StudentModel, TeacherModel

GPU = PlannedDevice.of("cuda")
_FP32 = 4
# Only to put candidates into an order: an H100's bf16 products as they usually run, NVLink, a 400 Gb/s port.
_FLOPS, _IN_NODE, _OVER_NETWORK, _LAUNCH = 4e14, 3e11, 4e10, 5e-6
_KERNELS_A_LAYER = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to put a recipe onto ranks."""

    world: int
    layouts: Mapping[str, Layout]
    """Of each teacher."""
    microbatch: int
    recompute: bool
    """Whether the student's layers run again in the backward pass."""
    rank: int
    """The fullest, by weights."""
    parts: Mapping[str, int]
    """Bytes that this rank holds whatever a step does, by what they are."""
    score: float
    """Lower is tried first."""

    @property
    def least_bytes(self) -> int:
        """Bytes that the rank holds at least."""
        return sum(self.parts.values())

    @property
    def words(self) -> list[str]:
        """The recipe's keys that say it."""
        found = []
        for name, layout in self.layouts.items():
            axes = dataclasses.asdict(layout)
            found += [f"teachers.{name}.layout.{axis}={size}" for axis, size in axes.items() if size > 1]
        found += [f"batch.microbatch={self.microbatch}"]
        return [*found, "student.recompute=true"] if self.recompute else found

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return a recipe in this way."""
        return dataclasses.replace(
            recipe,
            teachers={
                name: dataclasses.replace(choice, layout=self.layouts[name])
                for name, choice in recipe.teachers.items()
            },
            batch=dataclasses.replace(recipe.batch, microbatch=self.microbatch, tokens=None),
            student=dataclasses.replace(recipe.student, recompute=self.recompute),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """Where candidates are looked for."""

    recipe: Recipe
    """Whose teachers' layouts, microbatch and recomputation are varied; all else stays."""
    shapes: Mapping[str, ModelShape]
    """Its models, the student first."""
    world: int
    """Ranks."""
    length: int
    """Tokens of a sample."""
    per_node: int
    """Ranks of a node."""

    def candidates(self) -> list[Candidate]:
        """Return every candidate, the most promising first.

        Raises:
            ConfigError: the update cannot be shared by the ranks, or the student's own layout does not fit.
        """
        recipe, world = self.recipe, self.world
        recipe.batch.accumulation(world)
        check_layout(recipe.student, self.shapes["student"].architecture, world, "student")
        share = recipe.batch.samples // world
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        found = []
        for chosen in itertools.product(*(self._layouts(name) for name in recipe.teachers)):
            layouts = dict(zip(recipe.teachers, chosen, strict=True))
            try:
                group = vocab_group_size(chosen, world, recipe.head.ranks)
            except ConfigError:
                continue  # head.ranks does not hold these replicas
            rank, parts = self._fullest(layouts, group)
            found += [
                Candidate(
                    world=world,
                    layouts=layouts,
                    microbatch=size,
                    recompute=recompute,
                    rank=rank,
                    parts=parts,
                    score=self._score(layouts, size, share // size, recompute=recompute),
                )
                for size, recompute in itertools.product(sizes, (False, True))
            ]
        return sorted(found, key=lambda one: (one.score, one.words))

    def _layouts(self, teacher: str) -> list[Layout]:
        architecture = self.shapes[teacher].architecture
        legal = legal_layouts(
            self.world,
            heads=architecture.heads,
            groups=architecture.query_groups,
            experts=architecture.num_experts,
            layers=architecture.layers,
        )
        return [layout for layout in legal if _has_widths(architecture, layout)]

    def _fullest(self, layouts: Mapping[str, Layout], group: int) -> tuple[int, dict[str, int]]:
        """Return the rank of the first vocabulary group that holds most, and what it holds at least."""
        vocabularies = [shape.architecture.vocabulary for shape in self.shapes.values()]
        best: tuple[int, dict[str, int]] | None = None
        for rank in range(group):
            place = VocabGroup.of(vocabularies, group, rank)
            parts = {
                f"{name} weights": _weights(shape, layouts.get(name, Layout()), self.world, place)
                for name, shape in self.shapes.items()
            }
            if best is None or sum(parts.values()) > sum(best[1].values()):
                best = rank, parts
        assert best is not None, "a group has a rank"
        return best[0], best[1] | self._trained(best[1]["student weights"])

    def _trained(self, weights: int) -> dict[str, int]:
        """Return what the student holds beside weights: fp32 sums of gradients, the optimizer's share."""
        optimizer = self.recipe.optimizer
        dtype = Precision.on(self.recipe.student.precision, GPU).dtype
        gradients = _FP32 * weights // dtype.itemsize
        if optimizer.name == "sgd":
            return {"gradients": gradients}
        kinds = 2 if dtype.itemsize == _FP32 else 3
        shards = self.world if optimizer.distributed else 1
        return {"gradients": gradients, "masters and moments": kinds * gradients // shards}

    def _score(
        self, layouts: Mapping[str, Layout], samples: int, microbatches: int, *, recompute: bool
    ) -> float:
        """Weigh a step, in rough seconds."""
        total = 0.0
        for name, shape in self.shapes.items():
            forward = _forward_seconds(shape, samples, self.length)
            if name == "student":
                total += microbatches * forward * (4 if recompute else 3)
            else:
                choice = self.recipe.teachers[name]
                views = layouts[name].replica_size * min(microbatches, choice.shared_schedule)
                bubble = (layouts[name].pipeline - 1) / views
                passes = 2 if choice.view == "complementary" else 1
                sent = self._sent_seconds(shape, layouts[name], samples)
                total += microbatches * passes * (forward * (1 + bubble) + sent)
        return total

    def _sent_seconds(self, shape: ModelShape, layout: Layout, samples: int) -> float:
        """Weigh what travels for one view of a rank: tensor sums, tokens to experts, stages, answers."""
        architecture = shape.architecture
        size = 2 * shape.choice.context.parts * self.length * samples * architecture.hidden  # bf16 states
        replica_link = _IN_NODE if layout.replica_size <= self.per_node else _OVER_NETWORK
        found = 0.0
        if layout.tensor > 1:
            link = _IN_NODE if layout.tensor <= self.per_node else _OVER_NETWORK
            found += 4 * architecture.layers * (layout.tensor - 1) * size / link
        block = layout.expert * layout.expert_tensor
        if block > 1 and architecture.experts is not None:
            link = _IN_NODE if block * layout.pipeline <= self.per_node else _OVER_NETWORK
            copies = 2 * architecture.layers * architecture.experts.per_token * layout.tensor
            found += copies * size / link
        if layout.pipeline > 1:
            found += layout.pipeline * size / replica_link
        return found + layout.replica_size * size / 2 / replica_link


def _has_widths(architecture: Architecture, layout: Layout) -> bool:
    try:
        check_widths(architecture, layout)
    except ConfigError:
        return False
    return True


def _weights(shape: ModelShape, layout: Layout, world: int, place: VocabGroup) -> int:
    """Return the bytes of a model's weights on a rank of the first vocabulary group."""
    choice, architecture = shape.choice, shape.architecture
    head = None if isinstance(choice, StudentModel) else place.columns(architecture.vocabulary)
    cut = choice.layout if isinstance(choice, StudentModel) else layout
    shard = Shard.of(cut, place.rank, world, architecture.layers, head=head)
    dtype = Precision.on(choice.precision, GPU).dtype
    return weight_bytes(architecture, shard, dtype, choice.fp8 if isinstance(choice, TeacherModel) else None)


@functools.lru_cache(maxsize=4096)
def _body(architecture: Architecture, context: Context, length: int) -> int:
    return body_flops(architecture, context, [length], 0)


def _forward_seconds(shape: ModelShape, samples: int, length: int) -> float:
    """Weigh one forward pass: products, and a launch for each kernel."""
    kernels = _KERNELS_A_LAYER * shape.architecture.layers
    return samples * _body(shape.architecture, shape.choice.context, length) / _FLOPS + kernels * _LAUNCH
