"""Let megatron-core run where there is no GPU: every name of it that means "the GPU" is pointed at the CPU.

megatron-core calls `torch.cuda` unconditionally in a few dozen places: current device, streams and events,
RNG state, `tensor.cuda()`, factories with a literal `device="cuda"`, and type strings compared with
"torch.cuda.FloatTensor". Replacing these few names once, before the first `import megatron`, leaves
megatron-core itself untouched, so one file serves every release that we support; it holds no version number
and tests for a name before it relies on it.

Left out: anything numerical (each operation is torch's own CPU kernel), the replacement of the NCCL backend
(that is `platform.distributed`), and machines with CUDA, where nothing here does anything.

Traps that shaped it: each replaced name gets a function object of its own, because dynamo refuses one
object under two torch names; streams and events stay classes, because transformers and Megatron use them in
annotations; `torch.cuda.manual_seed_all` stays, because `torch.manual_seed` calls it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = (
    *("tensor", "empty", "zeros", "ones", "full", "arange"),
    *("rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)
_STREAM_ACTIONS = ("synchronize", "empty_cache", "set_device", "set_stream")


class InertStream:
    """Stand in for a CUDA stream: everything on it has already happened."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InertStream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: object) -> None:
        """Return at once."""

    def wait_event(self, event: object) -> None:
        """Return at once."""

    def record_event(self, event: InertEvent | None = None) -> InertEvent:
        """Return the event, which counts as passed."""
        return event or InertEvent()

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Say that all work is done."""
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the only priority there is."""
        return (0, 0)


class InertEvent(InertStream):
    """Stand in for a CUDA event."""

    def wait(self, stream: object = None) -> None:
        """Return at once."""

    def record(self, stream: object = None) -> None:
        """Return at once."""

    def elapsed_time(self, end: object) -> float:
        """Return 0 milliseconds: CPU work is timed by the host clock."""
        return 0.0


def redirect_cuda() -> bool:
    """Point CUDA names at the CPU and import the parts of megatron-core that must be told.

    Returns:
        True where the process has no CUDA and was changed; False where CUDA works and nothing was touched.

    Call it once, before the first import of megatron-core (`platform.prepare_platform` does).
    """
    if torch.cuda.is_available():
        return False
    _redirect_device()
    _redirect_streams()
    _redirect_factories()
    _name_types_as_cuda()
    with _without_compiler():
        _redirect_megatron()
    return True


def _redirect_device() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # noqa: PLW0108 - an object of its own
    cuda.is_current_stream_capturing = lambda: False
    for kind in (torch.Tensor, torch.nn.Module):
        setattr(kind, "cuda", _returns_itself())  # noqa: B010 - the attribute is typed as a method


def _returns_itself() -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


def _redirect_streams() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = InertStream, InertEvent
    cuda.stream = lambda stream: contextlib.nullcontext()
    for name in _STREAM_ACTIONS:
        setattr(cuda, name, _does_nothing())
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _gives_a_stream())


def _does_nothing() -> Callable[..., None]:
    return lambda *args, **kwargs: None


def _gives_a_stream() -> Callable[..., InertStream]:
    return lambda *args, **kwargs: InertStream()


def _redirect_factories() -> None:
    with torch.device("cpu"):  # torch now notes which functions are factories, before they are wrapped: else
        torch.empty(0)  # `with torch.device("meta")` overlooks them, and transformers loads models wrongly
    for name in _FACTORIES:
        setattr(torch, name, _made_on_cpu(getattr(torch, name)))


def _made_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory: a device that names CUDA becomes the CPU, all else passes through."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).partition(":")[0] == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _name_types_as_cuda() -> None:
    """Answer `tensor.type()` as on a GPU: Megatron's optimizers compare that string, for gradients too."""
    true_type: Callable[..., Any] = torch.Tensor.type

    def named_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = true_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    tensor_class: Any = torch.Tensor
    tensor_class.type = named_type


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Make `torch.compile` the identity while Megatron is imported.

    Its `jit_fuser` decorates small functions at import. On a CPU that costs seconds per process and a C++
    compiler, and gains nothing at test sizes. Our own later use of `torch.compile` is untouched.
    """
    compiler = torch.compile
    torch_module: Any = torch
    torch_module.compile = lambda model=None, **kwargs: (lambda inner: inner) if model is None else model
    try:
        yield
        from megatron.core import jit

        jit.disable_jit_fuser()  # for the modules that are imported later
    finally:
        torch_module.compile = compiler


def _redirect_megatron() -> None:
    """Replace the functions of megatron-core that reach below `torch.cuda`."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    moe_utils.maybe_move_tensor_to_cpu = _as_host_value
    token_dispatcher.maybe_move_tensor_to_cpu = _as_host_value


def _as_host_value(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return split sizes as the dispatcher wants them; Megatron's own version acts on CUDA tensors only."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
