"""Compile the passes over a slab: a graph for each set of losses and kind of shapes, never left uncompiled.

Uncompiled a pass takes several slabs of fp32 temporaries, so whatever would make torch.compile fall back
without a word ends the run here, as for FlexAttention (`models.flex`): `fullgraph`, a code object for each
function (dynamo's cache and limit hang on it) and a count of graphs. Rows are of any number (dynamic) from
two on; which numbers of rows are equal, or one, is part of the key, so that no graph is compiled twice.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from tide_megatron.base.errors import TideError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MANY = 10**6
KEEP_NOTHING = {
    "realize_reads_threshold": MANY,
    "realize_opcount_threshold": MANY,
    "realize_acc_reads_threshold": MANY,
}
"""Inductor's settings for these functions alone: it would put an expression of more than 30 operations into
memory, which here is a slab in fp32."""


class PassCompiler:
    """The compiled passes of a run."""

    def __init__(self, backend: Callable[..., Any] | None = None) -> None:
        """Start with nothing compiled.

        Args:
            backend: of torch.compile, called with a graph and its inputs; None: Inductor.
        """
        self.compilations = 0
        """Graphs that were compiled so far."""
        self._backend = backend
        self._functions: dict[Hashable, Callable[..., Any]] = {}

    def run(self, function: Callable[..., Result], options: tuple[Hashable, ...], *inputs: Any) -> Result:
        """Call a function that is compiled when this kind of inputs is met first.

        Args:
            function: of `options` and then `inputs`.
            options: what is fixed in its code.
            inputs: tensors, None, and tuples and lists of them; a tensor's first dimension may vary.

        Raises:
            TideError: torch left it uncompiled.
        """
        tensors = list(_tensors(inputs))
        key = (function.__name__, options, _shape(inputs), _rows(tensors))
        for tensor in tensors:
            _mark(tensor)
        is_known = key in self._functions
        if not is_known:
            self._functions[key] = self._compiled(function, options)
        before = self.compilations
        found: Result = self._functions[key](*inputs)
        if not is_known and self.compilations == before:
            raise TideError(
                "head.compiled: torch.compile left the head's passes uncompiled, which would take several "
                "times the memory; unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or set it to false"
            )
        return found

    def _compiled(
        self, function: Callable[..., Result], options: tuple[Hashable, ...]
    ) -> Callable[..., Result]:
        """Return a function of its own; it is compiled at its first call, which is logged."""

        def backend(graph: Any, inputs: Any) -> Any:
            self.compilations += 1
            log.info("head loss: compiling %s, graph %d", function.__name__, self.compilations)
            return (self._backend or _inductor)(graph, inputs)

        def call(*inputs: Any) -> Result:
            return function(*options, *inputs)

        # All functions of one `def` share a code object, and so dynamo's cache and limit; a copy has its own.
        own = types.FunctionType(
            call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__
        )
        compiled: Callable[..., Result] = torch.compile(own, fullgraph=True, backend=backend)
        return compiled


def _mark(tensor: Tensor) -> None:
    """Let rows vary and nothing else: dynamo would give up a size that was another in an earlier function."""
    from torch._dynamo import mark_static, maybe_mark_dynamic  # dynamo and Inductor take seconds to import

    for dimension in range(tensor.dim()):
        if dimension == 0 and len(tensor) > 1:
            maybe_mark_dynamic(tensor, dimension)
        else:
            mark_static(tensor, dimension)


def _inductor(graph: Any, inputs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=dict(KEEP_NOTHING))


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif inputs is not None:
        for part in inputs:
            yield from _tensors(part)


def _shape(inputs: Any) -> Hashable:
    """Describe nested inputs by all that a graph is compiled for but its numbers of rows."""
    if inputs is None:
        return None
    if isinstance(inputs, Tensor):
        return inputs.dtype, inputs.device, inputs.dim(), tuple(inputs.shape[1:])
    return tuple(_shape(part) for part in inputs)


def _rows(tensors: list[Tensor]) -> tuple[int, ...]:
    """Say of each tensor with rows whether it has one, or which was the first with as many."""
    first: dict[int, int] = {}
    return tuple(
        -1 if len(tensor) == 1 else first.setdefault(len(tensor), number)
        for number, tensor in enumerate(tensors)
        if tensor.dim()
    )
