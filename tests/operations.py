"""Dispatch modes that look for operations: what makes the host wait for a GPU, what adds in any order."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

INDEX = {
    "index_add": 2,
    "index_add_": 2,
    "scatter_add": 2,
    "scatter_add_": 2,
    "scatter_reduce": 2,
    "scatter_reduce_": 2,
    "index_reduce_": 2,
}
"""Operation -> which argument says where. What takes a maximum or a minimum has no order."""


class Asked(TorchDispatchMode):
    """Counts the operations for which a GPU would make the host wait."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("nonzero", "masked_select", "_local_scalar_dense"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


class Repeated(TorchDispatchMode):
    """Collects the operations on floating point numbers that add to a place twice, so that the order counts.

    For CPU tensors; CUDA adds by atomics in these.
    """

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            if name in INDEX and not {"amin", "amax"} & set(map(str, args[4:])):
                self._look(name, args[INDEX[name]], args[1])
            if name in ("index_put", "index_put_", "_index_put_impl_") and len(args) > 3 and args[3]:
                self.names.add(name)
            if name == "embedding_dense_backward" and len(args[1].unique()) < args[1].numel():
                self.names.add(name)  # sorted and summed in segments on CUDA, but nowhere promised
        return func(*args, **kwargs)

    def _look(self, name, index, axis):
        """Note the operation if a place comes twice along the axis."""
        ordered = index.sort(dim=axis if index.dim() > 1 else 0).values
        if bool((ordered.diff(dim=axis if index.dim() > 1 else 0) == 0).any()):
            self.names.add(name)
