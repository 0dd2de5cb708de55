"""Which experts tokens go to, in a plan: its routers hold no numbers, so a model of routing says how many.

Of a mixture layer the plan needs one thing, how many tokens each expert gets from each rank: all sizes of the
exchange and of the experts' products follow. `balanced` spreads a rank's copies evenly, `zipf` makes expert k
of a fixed shuffle 1 / k^s as popular as the first, and `Recorded` replays what a run has counted.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tide_megatron.models.build import TideModel
from tide_megatron.models.dispatcher import Dispatcher


class Routing(Protocol):
    """Says where tokens go."""

    def counts(self, place: LayerCall, rank: int, tokens: int) -> Sequence[int]:
        """Return how many copies each expert gets from a rank's tokens.

        Args:
            place: which call of which layer.
            rank: of the world.
            tokens: that the rank routes.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One forward pass through one mixture layer."""

    model: str
    layer: int
    """Among the model's mixture layers on this rank."""
    call: int
    """How often the layer was called before."""
    experts: int
    copies: int
    """Experts of a token."""


@dataclasses.dataclass(frozen=True)
class Zipf:
    """Expert k of a shuffle that is the same on all ranks is 1 / k^exponent as popular as the first."""

    exponent: float = 0.0
    """0: balanced."""

    def counts(self, place: LayerCall, rank: int, tokens: int) -> Sequence[int]:
        """Return how many copies each expert gets; none gets more than there are tokens."""
        popularity = _popularity(self.exponent, place.experts, place.layer)
        wanted = tokens * place.copies
        found = [min(tokens, int(share * wanted)) for share in popularity]
        left = wanted - sum(found)
        # What rounding and the cap left over: one each, beginning where other ranks do not.
        start, step = rank * left, 0
        while left:
            chosen = (start + step) % place.experts
            if found[chosen] < tokens:
                found[chosen] += 1
                left -= 1
            step += 1
        return found


@functools.lru_cache(maxsize=1024)
def _popularity(exponent: float, experts: int, layer: int) -> tuple[float, ...]:
    """Return the share of all copies that each expert of a layer would like to have."""
    weights = [(expert + 1) ** -exponent for expert in range(experts)]
    random.Random(layer).shuffle(weights)
    return tuple(weight / sum(weights) for weight in weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a run has counted."""

    by_rank: Sequence[Mapping[tuple[str, int], Sequence[Sequence[int]]]]
    """[world rank][model, layer][call][expert]."""

    def counts(self, place: LayerCall, rank: int, tokens: int) -> Sequence[int]:
        """Return what was counted there."""
        return self.by_rank[rank][place.model, place.layer][place.call]


Tell = Callable[[list[Tensor]], None]
"""Hears, by rank of the expert group, what each gives to the gather that comes next, [experts]."""


class RoutedLayer:
    """In the place of a routing map, what a model of routing says of it; a `Dispatcher.counted`."""

    def __init__(self, routing: Routing, place: LayerCall, dispatcher: Dispatcher, rank: int) -> None:
        """Stand beside one layer.

        Args:
            routing: the model.
            place: of the first call.
            dispatcher: the layer's.
            rank: of the world, this one.
        """
        self._routing, self._place, self._rank = routing, place, rank
        self._ranks = torch.distributed.get_process_group_ranks(dispatcher.tp_ep_group)
        self.tell: Tell = lambda by_rank: None

    def __call__(self, routing_map: Tensor) -> Tensor:
        """Return a [tokens, experts] host tensor with the column sums that routing says."""
        tokens = len(routing_map)
        by_rank = {rank: self._routing.counts(self._place, rank, tokens) for rank in self._ranks}
        if len(self._ranks) > 1:
            self.tell([torch.tensor(by_rank[rank]) for rank in self._ranks])
        self._place = dataclasses.replace(self._place, call=self._place.call + 1)
        counted = torch.zeros(tokens, self._place.experts, dtype=torch.int32)
        counted[0] = torch.tensor(by_rank[self._rank])
        return counted


class CountedLayer:
    """Keeps what a real layer counts; a `Dispatcher.counted`."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.calls: list[list[int]] = []

    def __call__(self, routing_map: Tensor) -> Tensor:
        """Keep how many tokens each expert gets; return the map."""
        self.calls.append(routing_map.sum(dim=0).tolist())
        return routing_map


def dispatchers_of(model: TideModel) -> list[Dispatcher]:
    """Return the dispatchers of a model's mixture layers on this rank, in order."""
    found = (getattr(module, "token_dispatcher", None) for module in model.modules())
    return [one for one in found if isinstance(one, Dispatcher)]


def route(model: TideModel, name: str, routing: Routing, rank: int) -> list[RoutedLayer]:
    """Let a model of routing count for all mixture layers of a model; return what stands beside them."""
    layers = []
    for number, dispatcher in enumerate(dispatchers_of(model)):
        place = LayerCall(
            model=name,
            layer=number,
            call=0,
            experts=dispatcher.num_experts,
            copies=dispatcher.config.moe_router_topk,
        )
        dispatcher.counted = layer = RoutedLayer(routing, place, dispatcher, rank)
        layers.append(layer)
    return layers


def watch_routing(model: TideModel, name: str) -> dict[tuple[str, int], list[list[int]]]:
    """Keep what the mixture layers of a real model count from now on, [model, layer] -> [call][expert]."""
    found = {}
    for number, dispatcher in enumerate(dispatchers_of(model)):
        dispatcher.counted = layer = CountedLayer()
        found[name, number] = layer.calls
    return found
