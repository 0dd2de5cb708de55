"""Lower a compiled function to Inductor's Triton code without a GPU, and count what its kernels move.

A `backend` for torch.compile: the graph goes through Inductor's passes, fusion and code generation as it
would on an H100, the code is read, and the graph itself is run where its tensors are. No kernel is built, and
neither a GPU nor Triton is needed: Inductor asks a GPU for its properties only, and they are given here.

What is counted is each kernel's pointers to large arrays: an array that one kernel loads twice, block by
block, comes from memory once.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of a graph."""

    name: str
    reads: tuple[int, ...]
    """Bytes of each large array that it loads from."""
    writes: tuple[int, ...]
    """Bytes of each large array that it stores to."""
    loads: int
    """Load instructions from large arrays; above the number of `reads`, the rest come from a cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """One graph."""

    kernels: tuple[Kernel, ...]
    """Those that touch a large array."""
    num_kernels: int
    """All of them."""
    allocated: tuple[int, ...]
    """Bytes of each large array that is allocated."""
    code: str
    """What Inductor wrote."""


class TritonCounter:
    """A backend for torch.compile that counts."""

    def __init__(self, large: int, called: Callable[[Lowered], None] = lambda lowered: None) -> None:
        """Start with no graph.

        Args:
            large: numbers from which on an array is large.
            called: told of every call of a graph.
        """
        self.large, self.called = large, called
        self.graphs: list[Lowered] = []

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Any:
        """Lower a graph of dynamo's; return it to be run by torch's operations."""
        from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
        from torch._inductor.decomposition import select_decomp_table

        def compile_graph(inner: Any, fakes: Sequence[Any]) -> Any:
            here = copy.deepcopy(inner)
            lowered = _lower(inner, fakes, self.large)
            self.graphs.append(lowered)

            def run(*given: Any) -> Any:
                self.called(lowered)
                return here(*given)

            return make_boxed_func(run)

        return aot_module_simplified(
            graph,
            inputs,
            fw_compiler=compile_graph,
            inference_compiler=compile_graph,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )


def _lower(graph: Any, inputs: Sequence[Any], large: int) -> Lowered:
    """Move a graph to an H100 and read what Inductor writes for it."""
    from torch._inductor import config
    from torch._inductor.compile_fx import view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    from tide_megatron.head.compiler import KEEP_NOTHING

    mode = torch._guards.detect_fake_mode(inputs)
    view_to_reshape(graph)
    with V.set_fake_mode(mode), DebugContext(), config.patch(**KEEP_NOTHING, compile_threads=1):
        joint_graph_passes(graph)
        post_grad_passes(graph, is_inference=True)
        device = torch.device("cuda", 0)
        with _an_h100():
            with mode:
                moved = [
                    torch.ops.aten.empty_strided.default(
                        part.shape, part.stride(), dtype=part.dtype, device=device
                    )
                    if isinstance(part, Tensor)
                    else part
                    for part in inputs
                ]
            for node in graph.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": device}
            FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
            graph.recompile()
            lowering = GraphLowering(graph, example_inputs=moved, shape_env=mode.shape_env, is_inference=True)
            with V.set_graph_handler(lowering):
                lowering.run(*moved)
                code = lowering.codegen()[0]
                names = dict(zip(lowering.graph_input_names, moved, strict=True))
                sizes = [size for part in inputs if isinstance(part, Tensor) for size in part.shape]
                symbols = {str(size): _hint(size) for size in sizes if not isinstance(size, int)}
    return _read(getattr(code, "value", code), names, symbols, large)


@contextlib.contextmanager
def _an_h100() -> Iterator[None]:
    """Answer what Inductor asks of a GPU."""
    from torch._dynamo.device_interface import CudaInterface as cuda
    from torch._inductor import scheduler
    from torch._inductor.runtime import hints
    from torch.utils import _triton as triton

    facts = {
        "type": "cuda",
        "index": 0,
        "multi_processor_count": 132,
        "cc": 90,
        "major": 9,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "warp_size": 32,
    }
    known = {field for field in hints.DeviceProperties._fields}
    card = hints.DeviceProperties(**{key: value for key, value in facts.items() if key in known})
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "get_device_properties", lambda device=None: card),
            (cuda, "is_available", staticmethod(lambda: True)),
            (cuda, "get_compute_capability", staticmethod(lambda device=None: 90)),
            (cuda, "current_device", staticmethod(lambda: 0)),
            (hints.DeviceProperties, "create", classmethod(lambda cls, device: card)),
            (triton, "triton_hash_with_backend", lambda: "none"),
            (scheduler, "has_triton", lambda: True),
            (torch._subclasses.fake_tensor, "init_gpu_context", lambda device=None: None),
        ):
            stack.enter_context(patch.object(owner, name, value))
        for name in ("arange", "empty", "full", "ones", "zeros"):  # `platform.cpu` makes them on the CPU
            factory = getattr(torch, name)
            stack.enter_context(patch.object(torch, name, getattr(factory, "__wrapped__", factory)))
        yield


def _read(code: str, inputs: dict[str, Any], symbols: dict[str, int], large: int) -> Lowered:
    """Count kernels and arrays in the code of a graph."""
    arrays = {
        name: (math.prod(_hint(size) for size in part.shape), part.dtype.itemsize)
        for name, part in inputs.items()
        if isinstance(part, Tensor)
    }
    allocated = []
    for name, sizes, dtype in re.findall(
        r"^\s*(\w+) = empty_strided_cuda\(\((.*?),?\), \(.*?\), torch\.(\w+)\)", code, re.MULTILINE
    ):
        number = math.prod(eval(size, {}, symbols) for size in sizes.split(",") if size.strip())
        arrays[name] = (number, getattr(torch, dtype).itemsize)
        if number >= large:
            allocated.append(number * arrays[name][1])
    for new, old in re.findall(r"^\s*(\w+) = (\w+);? *(?:del \2|# reuse|#alias)", code, re.MULTILINE):
        arrays[new] = arrays[old]
    bodies = dict(re.findall(r"^def (triton_\w+)\(.*?\):\n(.*?)^'''", code, re.MULTILINE | re.DOTALL))
    heads = dict(re.findall(r"^def (triton_\w+)\((.*?)\):", code, re.MULTILINE))
    calls = re.findall(r"^\s*(triton_\w+)\.run\((.*?), stream=", code, re.MULTILINE)
    kernels = [_kernel(name, given, heads[name], bodies[name], arrays, large) for name, given in calls]
    return Lowered(
        kernels=tuple(kernel for kernel in kernels if kernel.reads or kernel.writes),
        num_kernels=len(calls),
        allocated=tuple(allocated),
        code=code,
    )


def _kernel(
    name: str, given: str, head: str, body: str, arrays: dict[str, tuple[int, int]], large: int
) -> Kernel:
    parameters = [part.split(":")[0].strip() for part in head.split(",")]
    meant = dict(zip(parameters, (part.strip() for part in given.split(",")), strict=False))
    big = {
        parameter: arrays[array][0] * arrays[array][1]
        for parameter, array in meant.items()
        if array in arrays and arrays[array][0] >= large
    }
    loaded, stored = (re.findall(rf"tl\.{word}\((\w+) \+", body) for word in ("load", "store"))
    return Kernel(
        name=name,
        reads=tuple(size for parameter, size in big.items() if parameter in loaded),
        writes=tuple(size for parameter, size in big.items() if parameter in stored),
        loads=sum(parameter in big for parameter in loaded),
    )


def _hint(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size.node.hint)
