"""Bring tokens to their experts and add up what comes back, in fp32 and in an order that never changes.

megatron-core's dispatcher puts tokens in order by `masked_select`, for whose size the host waits twice a
layer, and adds the experts' outputs by a bf16 `scatter_add_`, whose order on CUDA is any. Here a stable sort
makes the order: row by row of the first expert, then of the second, within an expert by token. From it
follows where each token's copies are, so they are gathered and added, from the lowest expert to the highest,
in fp32, and rounded once. The way back is the same pair: what was gathered is added, what was added gathered.

Where all experts are on this rank nothing else is left to do, and no number leaves the device. Else
megatron-core's all-to-all runs between the two, for which the host waits once a layer: it must know how many
tokens go where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tide_megatron.platform

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.autograd import Function

from tide_megatron.base.device_kind import kind_of


class Order(NamedTuple):
    """Tokens' copies, ordered by expert, then by token."""

    row: Tensor
    """[tokens, copies] int64: where each copy lies, that for the lowest expert first."""
    token: Tensor
    """[rows] int64: whose copy lies there."""
    place: Tensor
    """[rows] int64: token and expert as one number, where their weight stands in [tokens x experts]."""

    @classmethod
    def of(cls, chosen: Tensor, copies: int) -> Order:
        """Make the order of [tokens, experts] bool, of which each token has chosen `copies`."""
        experts = chosen.to(torch.uint8).topk(copies, dim=1).indices.sort(dim=1).values  # ascending
        expert, source = experts.flatten().sort(stable=True)  # [rows]; source: number of a copy, by token
        row = torch.empty_like(source).scatter_(0, source, torch.arange(len(source), device=source.device))
        token = source.div(copies, rounding_mode="floor")
        return cls(row.view_as(experts), token, token * chosen.shape[1] + expert)

    def arrange(self, values: Tensor) -> Tensor:
        """Bring [tokens, experts] values of the chosen experts into the order, [rows]."""
        return values.flatten().index_select(0, self.place)


def gather_copies(tokens: Tensor, order: Order) -> Tensor:
    """Return a copy of [tokens, hidden] for each expert of each, [rows, hidden]."""
    return _Gather.apply(tokens, order.row, order.token)  # type: ignore[no-any-return, no-untyped-call]


def add_copies(rows: Tensor, order: Order) -> Tensor:
    """Return the sum of each token's [rows, hidden], [tokens, hidden] of the same dtype."""
    return _Add.apply(rows, order.row, order.token)  # type: ignore[no-any-return, no-untyped-call]


class _Gather(Function):
    """Rows of tokens; the way back adds each token's."""

    @staticmethod
    def forward(context: Any, tokens: Tensor, row: Tensor, token: Tensor) -> Tensor:
        """Return [rows, hidden]."""
        context.save_for_backward(row)
        return tokens.index_select(0, token)

    @staticmethod
    def backward(context: Any, *incoming: Tensor) -> tuple[Tensor, None, None]:
        """Return the derivative of the tokens."""
        (row,) = context.saved_tensors
        return _sum(incoming[0], row), None, None


class _Add(Function):
    """Sums of each token's rows; the way back gathers."""

    @staticmethod
    def forward(context: Any, rows: Tensor, row: Tensor, token: Tensor) -> Tensor:
        """Return [tokens, hidden]."""
        context.save_for_backward(token)
        return _sum(rows, row)

    @staticmethod
    def backward(context: Any, *incoming: Tensor) -> tuple[Tensor, None, None]:
        """Return the derivative of the rows."""
        (token,) = context.saved_tensors
        return incoming[0].index_select(0, token), None, None


def _sum(rows: Tensor, row: Tensor) -> Tensor:
    """Add up rows [rows, hidden] that [tokens, copies] numbers name, in fp32."""
    if kind_of(rows.device) == "cpu":  # one after the other, as megatron-core's `scatter_add_` does there
        total = rows.index_select(0, row[:, 0]).float()
        for column in row.T[1:]:
            total += rows.index_select(0, column)
    else:  # a sum over an axis that is not the last: each thread adds one element's copies, whoever is beside
        total = rows.index_select(0, row.flatten()).view(*row.shape, -1).sum(dim=1, dtype=torch.float32)
    return total.to(rows.dtype)


class Dispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """megatron-core's dispatcher with our order and sums around its exchange."""

    def __init__(self, layer: MoELayer, groups: ProcessGroupCollection, *, asks_host: bool) -> None:
        """Take the place of a layer's own dispatcher.

        Args:
            layer: a mixture layer, already built.
            groups: its model's.
            asks_host: whether its experts must know on the host how many tokens they have.
        """
        super().__init__(layer.num_local_experts, layer.local_expert_indices, layer.config, groups)
        self._is_local = self.ep_size == self.tp_size == 1
        self._asks_host = asks_host
        self._order: Order | None = None
        self._counts: Tensor | None = None
        self.counted: Callable[[Tensor], Tensor] = lambda routing_map: routing_map
        """Gives what [tokens, experts] are counted: the routing map. A plan, whose map holds no numbers, puts
        a model of routing here (`plan.routing`)."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a copy of each token for each of its experts [rows, hidden], with its weight [rows]."""
        self.hidden_shape, self.probs = hidden_states.shape, probs
        self._counts = self.preprocess(self.counted(routing_map))
        self.tokens_per_expert = self._counts
        if not self._is_local:  # an exchange needs numbers on the host; megatron-core waits before it
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self._counts)
        self._order = Order.of(routing_map, self.config.moe_router_topk)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        return gather_copies(tokens, self._order), self._order.arrange(probs)

    def dispatch_postprocess(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return this rank's experts' tokens in their order, how many each has [experts], their weights."""
        assert self._counts is not None, "tokens were never dispatched"
        if self._is_local:
            return tokens, self._counts, probs
        tokens, counts, probs = super().dispatch_postprocess(tokens, probs)
        return tokens, counts if self._asks_host else self._counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Bring the experts' outputs into the order in which tokens came from each rank."""
        return hidden_states if self._is_local else super().combine_preprocess(hidden_states)

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        """Return each token's sum in the shape that the layer was given."""
        assert self._order is not None, "tokens were never dispatched"
        return add_copies(rows, self._order).view(self.hidden_shape)


def own_dispatchers(model: torch.nn.Module, groups: ProcessGroupCollection) -> None:
    """Give every mixture layer of a model our dispatcher.

    Afterwards, because megatron-core 0.16 hands groups only to a MoELayer that is exactly its own.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            asks_host = getattr(module.experts, "asks_host", True)
            module.token_dispatcher = Dispatcher(module, groups, asks_host=asks_host)
