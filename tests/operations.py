"""Dispatch modes that look for operations: what makes the host wait for a GPU, what adds in any order."""

import traceback
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
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


ASKING = (
    "tolist",
    "item",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "unique",
)
"""Functions by which the host learns a number of a tensor's, as Python calls them."""
ON_THE_HOST = {
    "train/counts.py": "the vectors that gloo gathered",
    "models/attention.py": "the kernel of the CPU lists its rectangles; FlexAttention's masks ask nothing",
    "models/experts.py": "experts one after the other; a GPU multiplies them grouped, by counts on the GPU",
    "base/segments.py": "an assertion that is made of tensors on the CPU only",
}
"""Files of the package that ask tensors which are on the host in a CUDA run too, or where none is."""


class Waits(TorchFunctionMode):
    """Counts by place in the package where a GPU would make the host wait; megatron-core's own are left out.

    As a mode of functions it sees what never reaches a dispatcher on the CPU (`tolist`, `cpu`), and what is
    made on a device from Python's numbers, which is a copy that is waited for.
    """

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        is_made = name in ("tensor", "as_tensor", "new_tensor")
        is_picked = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else args[1:2])
        )
        is_counted = name == "repeat_interleave" and "output_size" not in kwargs
        if name in ASKING or is_made or is_picked or is_counted:
            self._note(name)
        return func(*args, **kwargs)

    def _note(self, name):
        for frame in reversed(traceback.extract_stack()):
            if "/megatron/core/" in frame.filename:
                return
            file = frame.filename.rpartition("/tide_megatron/")[2]
            if file != frame.filename and not file.startswith("platform/"):
                if file not in ON_THE_HOST:
                    self.places[f"{name} in {file}: {frame.line}"] += 1
                return
