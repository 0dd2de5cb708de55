"""A world of one: this process stands for one rank of a world of any size, and no other process exists.

A plan runs our own training step on meta tensors, which have shapes and no numbers, so nothing needs to
travel: a collective is noted and answered at once with the right shapes. What the host reads must be right,
though (how many rows each rank has decides every later shape). It is computed where the others would have
computed it, since noise is a pure function: `Peers` says what other ranks would have sent, and where it does
not know, they send what this rank sends.

torch hands the calls of a process group that is written in Python to that group itself, whatever device its
tensors are on. So one class serves cpu, cuda and meta, needs none of torch's kernels for meta collectives,
and exists in every supported release (under the older and the newer names of its methods).

The rest of the file is what megatron-core asks of a device while it builds and updates: its current device,
and the type strings of tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from tide_megatron.platform.distributed import start_distributed, stop_distributed

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, _create_work_from_future  # type: ignore[attr-defined]
from torch.distributed import ProcessGroup, ReduceOp
from torch.futures import Future

from tide_megatron.base.device import Device, Ranks
from tide_megatron.base.device_kind import planned_as

META = torch.device("meta")
BACKENDS = {"gloo": "lone_gloo", "nccl": "lone_nccl"}
"""What ranks would talk by -> the name of the backend that stands for it."""


class Call(NamedTuple):
    """One collective, or one half of a transfer, of this rank."""

    kind: str
    """torch's name of the operation, as `parallel.collectives.Traffic` has it."""
    num_bytes: int
    """Of what this rank hands in."""
    ranks: tuple[int, ...]
    """World ranks that take part."""
    is_host: bool
    """Whether host values travel."""


Peers = Callable[[Tensor, Sequence[int]], Sequence[Tensor] | None]
"""(what this rank gives to a gather of host values, world ranks) -> what each gives; None: the same."""


@dataclasses.dataclass(kw_only=True)
class Listener:
    """Who hears of collectives, and who knows what other ranks would send."""

    on_call: Callable[[Call], None] = lambda call: None
    peers: Peers = lambda tensor, ranks: None


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return _create_work_from_future(future)


def _flat(tensors: Any) -> list[Tensor]:
    """Return the tensors of nested lists."""
    if isinstance(tensors, Tensor):
        return [tensors]
    return [tensor for part in tensors for tensor in _flat(part)]


_ProcessGroup: Any = ProcessGroup  # its stubs overload what a group written in Python defines once


class LoneGroup(_ProcessGroup):  # type: ignore[misc]
    """A group of ranks of which only one exists."""

    listener: ClassVar[Listener] = Listener()
    """Of the world that this process stands in."""

    def __init__(self, rank: int, size: int, ranks: Sequence[int]) -> None:
        """Take the place of a rank.

        Args:
            rank: its number in the group.
            size: ranks of the group.
            ranks: their numbers in the world.
        """
        super().__init__(rank, size)
        self._rank, self._size, self._ranks = rank, size, tuple(ranks)

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def rank(self) -> int:
        """Return this rank's number."""
        return self._rank

    def getBackendName(self) -> str:
        """Return what torch prints."""
        return "lone"

    @property
    def pg_name(self) -> str:
        """The name under which torch knows the group."""
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        """The same."""
        return self.pg_name

    def _note(self, kind: str, given: Any) -> None:
        tensors = _flat(given)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        is_host = all(tensor.device.type != "meta" for tensor in tensors)
        LoneGroup.listener.on_call(Call(kind, size, self._ranks, is_host))

    def _from_all(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return what each rank gives to a gather."""
        found = None if tensor.device.type == "meta" else LoneGroup.listener.peers(tensor, self._ranks)
        return [tensor] * self._size if found is None else found

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        """Reduce in place over ranks that all give the same."""
        if tensor.device.type != "meta" and operation == ReduceOp.SUM:
            tensor.mul_(self._size)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Reduce tensors."""
        self._note("allreduce", tensors)
        for tensor in tensors:
            self._reduce(tensor, opts.reduceOp)
        return _done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Reduce several tensors at once."""
        self._note("allreduce_coalesced", tensors)
        for tensor in tensors:
            self._reduce(tensor, opts.reduceOp)
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Keep what is here: the source has the same."""
        self._note("broadcast", tensors)
        return _done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        """Gather into a list."""
        self._note("allgather", inputs)
        for parts, given in zip(outputs, inputs, strict=True):
            for part, other in zip(parts, self._from_all(given), strict=True):
                part.copy_(other)
        return _done(outputs)

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        """Gather into one tensor."""
        self._note("allgather_base", given)
        self._fill(output, given)
        return _done(output)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Any:
        """Gather several tensors at once."""
        self._note("allgather_into_tensor_coalesced", inputs)
        for output, given in zip(outputs, inputs, strict=True):
            self._fill(output, given)
        return _done(outputs)

    def _fill(self, output: Tensor, given: Tensor) -> None:
        if given.device.type != "meta":
            output.copy_(torch.cat([part.flatten() for part in self._from_all(given)]).view_as(output))

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        """Reduce, and keep this rank's part."""
        self._note("reduce_scatter", inputs)
        return _done(outputs)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        """Reduce, and keep this rank's part."""
        self._note("reduce_scatter_base", given)
        return _done(output)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Any:
        """Reduce several tensors at once."""
        self._note("reduce_scatter_tensor_coalesced", inputs)
        return _done(outputs)

    def all_to_all_single(
        self, output: Tensor, given: Tensor, output_sizes: Any, input_sizes: Any, opts: Any = None
    ) -> Any:
        """Exchange parts; only their sizes are looked at."""
        self._note("alltoall_base", given)
        return _done(output)

    def send(self, tensors: list[Tensor], destination: int, tag: int = 0) -> Any:
        """Note what leaves."""
        self._note("send", tensors)
        return _done(tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Any:
        """Note what comes."""
        self._note("recv", tensors)
        return _done(tensors)

    def barrier(self, opts: Any = None) -> Any:
        """Return at once."""
        self._note("barrier", [])
        return _done(None)

    # torch before 2.13 calls the same by other names.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _make_group(options: Any, _: Any) -> LoneGroup:
    """Make a group as torch asks for it; of the world it tells no ranks."""
    ranks = options.global_ranks_in_group or range(options.group_size)
    return LoneGroup(options.group_rank, options.group_size, ranks)


def _register() -> None:
    for name in BACKENDS.values():
        if name not in dist.Backend.backend_list:
            dist.Backend.register_backend(
                name, _make_group, extended_api=True, devices=["cpu", "cuda", "meta"]
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedDevice(Device):
    """A device of a kind that need not be here: its tensors are meta tensors."""

    @property
    def torch_device(self) -> torch.device:
        """Return the device in torch's words."""
        return META

    @staticmethod
    def of(kind: Any) -> PlannedDevice:
        """Make one of a kind, `cpu` or `cuda`; a GPU is one of sm_90."""
        if kind == "cpu":
            return PlannedDevice(type="cpu", index=0, backend="gloo", threads=1)
        return PlannedDevice(
            type="cuda", index=0, backend="nccl", threads=1, name="planned GPU", capability=(9, 0)
        )


@contextlib.contextmanager
def lone_world(device: PlannedDevice, rank: int, size: int, listener: Listener) -> Iterator[None]:
    """Stand for one rank of a world until the block ends. This process must be in no world.

    Args:
        device: of all ranks.
        rank: to stand for.
        size: ranks of the world.
        listener: hears of every collective.
    """
    assert not dist.is_initialized(), "a planned world begins where no other one is"
    _register()
    before = LoneGroup.listener
    LoneGroup.listener = listener
    state = torch.get_rng_state()
    try:
        with planned_as(device.type), _redirected_to_meta():
            start_distributed(
                device,
                Ranks(rank=rank, local_rank=0, world_size=size),
                store=HashStore(),
                backend=BACKENDS[device.backend],
            )
            try:
                yield
            finally:
                stop_distributed()
    finally:
        LoneGroup.listener = before
        torch.set_rng_state(state)


@contextlib.contextmanager
def _redirected_to_meta() -> Iterator[None]:
    """Point the current device at meta, and let the optimizer take meta tensors for those of a GPU."""
    from megatron.core.tensor_parallel import mappings

    cuda, tensor_class = torch.cuda, torch.Tensor
    before: tuple[Any, Any, Any] = (cuda.current_device, tensor_class.type, mappings._gather_along_first_dim)

    def named_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = before[1](self, *args, **kwargs)
        return f"torch.cuda.{answer.rpartition('.')[2]}" if isinstance(answer, str) else answer

    def gather(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Gather where the tensor is; megatron-core makes room on the current device."""
        cuda.current_device = lambda: tensor.device  # type: ignore[assignment, return-value]
        try:
            return before[2](tensor, *args, **kwargs)
        finally:
            cuda.current_device = lambda: META  # type: ignore[assignment, return-value]

    mappings._gather_along_first_dim = gather
    cuda.current_device = lambda: META  # type: ignore[assignment, return-value]
    tensor_class.type = named_type  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        cuda.current_device, tensor_class.type = before[:2]  # type: ignore[method-assign]
        mappings._gather_along_first_dim = before[2]
