"""Forward passes of a frozen model, through all its pipeline stages.

With several stages it is megatron-core's own forward-only schedule; its microbatches are the views, of all
source ranks and of as many accumulation microbatches as share it: the bubble is stages - 1 of views + stages
- 1. All views have one shape then, because a stage must know the shape of what it receives beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import Tensor

from tide_megatron.diffusion.views import View
from tide_megatron.models.attention import fit
from tide_megatron.models.build import TideModel


@torch.no_grad()
def forward_views(model: TideModel, views: Sequence[View]) -> list[Tensor]:
    """Forward views one after the other; all ranks of the model's replica call it with the same views.

    With experts spread over several replicas, all of these call it equally often.

    Args:
        model: frozen.
        views: at least one; of any shapes for a model of one stage, else they are padded to one.

    Returns:
        [rows of the view, hidden size] for each view on the last stage; nothing on the others.
    """
    if model.groups.pp.size() == 1:
        return [model(view)[: len(view.rows)] for view in views]
    fitted = [fit(view, model.make_kernel) for view in views]  # before a stage is told what it receives
    samples, length = max(len(view.ids) for view in fitted), max(view.length for view in fitted)
    equal = [view.padded(samples, length) for view in fitted]
    outputs: list[Tensor] = forward_backward_pipelining_without_interleaving(
        forward_step_func=_forward_step,
        data_iterator=iter(equal),
        model=model,
        num_microbatches=len(equal),
        seq_length=equal[0].ids.shape[1],
        micro_batch_size=samples,
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=P2PCommunicator(model.groups.pp, model.config),
        pg_collection=model.groups,
    )
    return [output[: len(view.rows)] for output, view in zip(outputs, equal, strict=False)]


def _forward_step(views: Iterator[View], model: TideModel) -> tuple[Tensor, Callable[..., Any]]:
    """Forward the next view, in the form in which megatron-core's schedule asks for it."""

    def keep(output: Tensor, non_loss_data: bool = False) -> Tensor:
        assert non_loss_data, "a teacher has no loss of its own"
        return output

    return model(next(views)), keep
