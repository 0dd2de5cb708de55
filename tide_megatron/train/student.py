"""The student: a trainable model inside megatron's data-parallel wrapper, with its optimizer.

Gradients of all microbatches and ranks are SUMMED (`calculate_per_token_loss`): every row enters the
objective already divided by the count of the whole step, so an average would divide twice (design section 3).
"""

from __future__ import annotations

import tide_megatron.platform

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.packing import packed
from tide_megatron.diffusion.views import View, trimmed_view
from tide_megatron.head.inputs import HeadInput
from tide_megatron.models.build import TideModel
from tide_megatron.parallel.layout import DataShard
from tide_megatron.train.optimizer import Update, build_optimizer, is_sharded, update
from tide_megatron.train.recipe import Optimizer


class Student:
    """One trainable model on this rank, data-parallel over all ranks."""

    def __init__(
        self,
        model: TideModel,
        context: Context,
        mask_id: int,
        options: Optimizer,
        *,
        pack: bool = False,
    ) -> None:
        """Wrap the model, whose weights are in place, and build its optimizer. All ranks do so together.

        Args:
            model: on this rank.
            context: how it reads.
            mask_id: its mask token.
            options: of its optimizer.
            pack: put several samples into one row of a view, as long as the microbatch is padded to.
        """
        self.model = model
        self.groups = groups = model.groups
        self.context = context
        self.mask_id = mask_id
        self.options = options
        self.pack = pack
        self.wrapped = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=is_sharded(options),
                grad_reduce_in_fp32=True,
                # The head's weight is used outside the model's forward pass, which overlap does not expect.
                overlap_grad_reduce=False,
            ),
            model,
            pg_collection=groups,
        )
        self.optimizer = build_optimizer(options, self.wrapped, groups, model.config.params_dtype)
        self._router_biases = [
            buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")
        ]

    @property
    def shard(self) -> DataShard:
        """Which part of the data this rank reads: its replica's."""
        return DataShard(rank=self.groups.dp.rank(), size=self.groups.dp.size())

    def view(self, noised: Noised) -> View:
        """Build what the student reads: its own mask token, its own context."""
        view = trimmed_view(noised, self.context, self.mask_id)
        if not self.pack:
            return view
        packs = packed(view, noised.batch.host_lengths, view.length)
        return packs.padded(len(packs.ids), view.length)  # of the length that whoever dealt the samples chose

    def rows(self, view: View) -> HeadInput:
        """Run the body; return the hidden rows [rows, hidden] with the head's weight [vocabulary, hidden].

        With them goes the fp32 buffer in which DDP adds up the weight's gradient, for a head loss that adds
        to it itself. Under expert parallelism all ranks call it equally often.
        """
        weight = self.model.head_weight
        buffer: Tensor = weight.main_grad  # type: ignore[attr-defined]
        return HeadInput(hidden=self.model.rows(view), weight=weight, gradient=buffer)

    def clear(self) -> None:
        """Zero the gradient buffers before a step's first microbatch."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def release(self, objective: Tensor) -> None:
        """Add one microbatch's gradients to the buffers."""
        objective.backward()  # type: ignore[no-untyped-call]

    def update(self, clock: Clock, *, finite: bool) -> Update:
        """Sum gradients over ranks, then apply or skip them together. All ranks call it together."""
        before = [bias.clone() for bias in self._router_biases]
        finalize_model_grads([self.wrapped], pg_collection=self.groups)
        result = update(self.optimizer, self.options, clock, finite=finite)
        if not result.applied:  # megatron has moved the biases already; a skipped step changes nothing
            for bias, old in zip(self._router_biases, before, strict=True):
                bias.copy_(old)
        return result
