"""The few collectives that our own code calls, and a counter of what travels.

Thin on purpose: sums of counts, agreement of all ranks on a decision, small Python values, and a fault on
one rank that becomes the same fault on all. Left out: collectives with an adjoint (they come with the
vocabulary-parallel head) and everything megatron-core does inside its own modules; `Traffic` sees
those as well.

Everywhere `group=None` means all ranks. Host values travel by gloo also in a CUDA run
(`platform.distributed`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from tide_megatron.base.disk import disk_words
from tide_megatron.base.errors import TideError

Value = TypeVar("Value")


def is_first() -> bool:
    """Say whether this is rank 0, or the only process. Not a collective."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_share() -> tuple[int, int]:
    """Return (this rank, ranks); (0, 1) where no world was joined. No collective."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier(group: ProcessGroup | None = None) -> None:
    """Wait for all ranks of the group. Every rank of the group must call it."""
    if dist.is_initialized():
        dist.barrier(group=group)


def sum_over(tensor: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Add a tensor over the ranks of a group, in place, and return it; carries no gradient.

    Every rank of the group must call it with the same shape and dtype.
    """
    if dist.is_initialized():
        dist.all_reduce(tensor, group=group)
    return tensor


def all_agree(flag: bool, group: ProcessGroup | None = None) -> bool:
    """Say whether the flag holds on every rank: one rank's no is everybody's no.

    Every rank of the group must call it.
    """
    objections = torch.tensor(int(not flag), dtype=torch.int64)
    return int(sum_over(objections, group)) == 0


def any_rank(*flags: bool, group: ProcessGroup | None = None) -> tuple[bool, ...]:
    """Say of each flag whether it holds on some rank, in one collective.

    Every rank of the group must call it, with as many flags.
    """
    return tuple(bool(held) for held in sum_over(torch.tensor(flags, dtype=torch.int64), group).tolist())


def gather_vectors(numbers: Sequence[float], group: ProcessGroup | None = None) -> torch.Tensor:
    """Collect a vector of numbers from each rank, [ranks, numbers] fp64 on the CPU, on every rank.

    Whole numbers up to 2^53 stay exact. Every rank of the group must call it, with as many numbers.
    """
    own = torch.tensor(numbers, dtype=torch.float64)
    if not dist.is_initialized():
        return own[None]
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    return torch.stack(gathered)


def gather_objects(value: Value, group: ProcessGroup | None = None) -> list[Value]:
    """Collect a small picklable value from each rank, in group order, on every rank.

    Every rank of the group must call it.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: Value | None, group: ProcessGroup | None = None) -> Value:
    """Give every rank the value of the group's first rank; the others pass None.

    Every rank of the group must call it.
    """
    box: list[Any] = [value]
    if dist.is_initialized():
        source = 0 if group is None else dist.get_global_rank(group, 0)
        dist.broadcast_object_list(box, src=source, group=group)
    answer: Value = box[0]
    return answer


@contextlib.contextmanager
def fail_together(group: ProcessGroup | None = None) -> Iterator[None]:
    """Run a block that may fail on some ranks only, such as reading files, and let all ranks learn of it.

    Every rank of the group must enter it, and the block must hold no collective of that group.

    Raises:
        TideError: (or its subclass) the user's fault as the lowest faulty rank saw it, on every rank, so
            that none is left waiting in the next collective. A bug of ours stays itself on its rank and is a
            RuntimeError on the others.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
        if isinstance(error, OSError) and error.filename is not None:  # a disk's, and no bug
            fault = TideError(disk_words(error))
            fault.__cause__ = error
    seen = gather_objects(None if fault is None else _Fault.of(fault), group)
    if fault is not None and not isinstance(fault, TideError):
        raise fault
    for rank, report in enumerate(seen):
        if report is not None:
            raise report.error(rank) from fault


@contextlib.contextmanager
def held_by_first(hold: Callable[[], AbstractContextManager[Value]]) -> Iterator[Value | None]:
    """Hold something on the first rank while the block runs, and nothing on the others.

    Every rank must enter it; leaving it is no collective.

    Args:
        hold: what the first rank enters.

    Yields:
        What it gave; None on the other ranks.

    Raises:
        TideError: on every rank, when the first could not have it.
    """
    with contextlib.ExitStack() as stack:
        value: Value | None = None
        with fail_together():
            if is_first():
                value = stack.enter_context(hold())
        yield value


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fault:
    """An exception in a form that always pickles."""

    kind: type[TideError] | None
    message: str

    @staticmethod
    def of(error: Exception) -> _Fault:
        if isinstance(error, TideError):
            return _Fault(kind=type(error), message=str(error))
        return _Fault(kind=None, message=f"{type(error).__name__}: {error}")

    def error(self, rank: int) -> Exception:
        return self.kind(self.message) if self.kind else RuntimeError(f"rank {rank} failed: {self.message}")


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count what this process hands to collectives, by kind, inside `with Traffic() as traffic`.

    `bytes` and `calls` are keyed by torch's own names without decoration: "allreduce", "alltoall_base",
    "broadcast"... It sees every collective, also megatron-core's, and slows each torch operation a little:
    for tests, `tide doctor` and measurements, not for training. Not a collective.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the call when it is a collective, then make it."""
        if func.namespace == "c10d":
            kind = func.overloadpacket.__name__.strip("_")
            self.calls[kind] += 1
            self.bytes[kind] += _bytes_sent(args)
        return func(*args, **(kwargs or {}))


def _bytes_sent(args: tuple[Any, ...]) -> int:
    """Return the size of a collective's input: the second argument where it holds tensors, else the first."""
    for argument in reversed(args[:2]):
        tensors = list(_tensors_in(argument))
        if tensors:
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return 0


def _tensors_in(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list):
        for item in argument:
            yield from _tensors_in(item)
