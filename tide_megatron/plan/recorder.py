"""What a step does on a rank, without or with numbers: collectives, FLOPs, what is alive, by phase and owner.

The recorder sees every operation of torch. Around real tensors it only looks. Around meta tensors it also
helps where code meets a host tensor beside a meta one (indices, masks, noise levels stay on the host in a
plan): the host tensor is taken for one on meta, a number that the host asks of a meta tensor is 1, and what
is copied to the host stays away.

Memory is counted by storages, from the operation that made one until Python lets go of it, and always belongs
to who allocated it (owner) for what (use). It is what torch's allocator is asked for; blocks, segments and
fragments are not in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tide_megatron.platform.lone_world import Call

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from tide_megatron.base.phases import Phases

OUTSIDE = "outside"
"""The phase of what happens between phases, and before the step."""
USES = {
    "student": "activations",
    "backward": "activations",
    "teacher": "activations",
    "exchange": "exchange",
    "head": "slabs",
    "optimizer": "optimizer",
}
"""Phase -> what a tensor that is made in it is for, until it is known better (`Recorder.adopt`)."""
OWNERS = {"student": "student", "backward": "student", "optimizer": "student", "exchange": "head"}
"""Phase -> whose work it is where no teacher is at it; other phases are their own owners."""


_FORMULAS: dict[Any, Any] = dict(flop_registry)


def _grouped_flops(rows: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Return the FLOPs of `torch._grouped_mm`, of rows with matrices or of two matrices cut alike."""
    return int(2 * rows.numel() * out_val.shape[-1])


def _attention_flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention on CPU: two products."""
    return int(4 * query.numel() * key.shape[-2])


def _attention_back_flops(slope: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of its way back: five products."""
    return int(10 * query.numel() * key.shape[-2])


_FORMULAS[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
_FORMULAS[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_back_flops
if hasattr(torch.ops.aten, "_grouped_mm"):
    _FORMULAS[torch.ops.aten._grouped_mm] = _grouped_flops


class Label(NamedTuple):
    """Whose bytes, for what."""

    owner: str
    use: str


class Sent(NamedTuple):
    """Where a collective belongs."""

    phase: str
    owner: str
    kind: str
    ranks: tuple[int, ...]


@dataclasses.dataclass
class Peak:
    """The most that was alive in a phase."""

    num_bytes: int = 0
    by_label: dict[Label, int] = dataclasses.field(default_factory=dict)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records while it is entered; see the module. Not a collective."""

    def __init__(self, device_type: str = "meta") -> None:
        """Start with nothing.

        Args:
            device_type: of the tensors that are counted: `meta`, or `cpu` to look at a real step.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.calls: Counter[Sent] = Counter()
        self.num_bytes: Counter[Sent] = Counter()
        """Handed in by this rank."""
        self.flops: Counter[Label] = Counter()
        """By owner and phase (as `use`), of matrix products and attention."""
        self.live: Counter[Label] = Counter()
        self.peaks: dict[str, Peak] = {}
        self.phase, self.owner = OUTSIDE, "run"
        self._sizes: dict[int, int] = {}
        self._labels: dict[int, Label] = {}
        self._total = 0
        self._is_muted = False

    # ----- where we are --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def within(self, *, phase: str | None = None, owner: str | None = None) -> Iterator[None]:
        """Book what happens in the block on a phase, an owner, or both."""
        before = self.phase, self.owner
        self.phase = before[0] if phase is None else phase
        self.owner = before[1] if owner is None else owner
        try:
            yield
        finally:
            self.phase, self.owner = before

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Count no bytes meanwhile: one kernel does what the block spells out. What lives on counts after."""
        before, self._is_muted = self._is_muted, True
        try:
            yield
        finally:
            self._is_muted = before

    @property
    def total(self) -> int:
        """Bytes alive."""
        return self._total

    def label(self) -> Label:
        """Return what a tensor is that is made now."""
        owner = OWNERS.get(self.phase, self.phase) if self.owner == "run" else self.owner
        return Label(owner, USES.get(self.phase, self.phase))

    def begin(self) -> None:
        """Forget what was sent, computed and alive at most so far: a step begins."""
        for counted in (self.calls, self.num_bytes, self.flops, self.peaks):
            counted.clear()

    # ----- collectives ---------------------------------------------------------------------------------

    def heard(self, call: Call) -> None:
        """Book a collective; a `platform.lone_world.Listener.on_call`."""
        self._book(call.kind, call.num_bytes, call.ranks)

    def _book(self, kind: str, size: int, ranks: tuple[int, ...]) -> None:
        sent = Sent(self.phase, self.label().owner, kind, ranks)
        self.calls[sent] += 1
        self.num_bytes[sent] += size

    # ----- memory --------------------------------------------------------------------------------------

    def adopt(self, tensors: Iterable[Tensor], label: Label) -> None:
        """Say whose some tensors are and what for, whether they were seen being made or not."""
        for tensor in tensors:
            self._track(tensor)
            key = tensor.untyped_storage()._cdata
            if key in self._labels:
                size = self._sizes[key]
                self.live[self._labels[key]] -= size
                self._labels[key] = label
                self.live[label] += size

    def _track(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size, label = storage.nbytes(), self.label()
        self._sizes[key], self._labels[key] = size, label
        self._total += size
        self.live[label] += size
        weakref.finalize(storage, self._gone, key)
        peak = self.peaks.setdefault(self.phase, Peak())
        if self._total > peak.num_bytes:
            peak.num_bytes = self._total
            peak.by_label = {name: held for name, held in self.live.items() if held}

    def _gone(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        if size or key in self._labels:
            self._total -= size
            self.live[self._labels.pop(key)] -= size

    def start_phase(self, phase: str) -> None:
        """Let a phase's peak be at least what is alive where it begins."""
        peak = self.peaks.setdefault(phase, Peak())
        if self._total > peak.num_bytes:
            peak.num_bytes = self._total
            peak.by_label = {name: held for name, held in self.live.items() if held}

    # ----- operations ----------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation, and book it."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._real_collective(func, args)
            return func(*args, **kwargs)
        given = list(_tensors((args, tuple(kwargs.values())))) if kwargs else list(_tensors(args))
        if any(tensor.is_meta for tensor in given):
            name = func.name()
            if name == "aten::_local_scalar_dense":
                return _one(args[0].dtype)
            if name == "aten::copy_" and args[0].device.type != "meta":
                return args[0]
            if name == "aten::_to_copy" and "device" in kwargs and kwargs["device"] is not None:
                kwargs = {**kwargs, "device": torch.device("meta")}
            if not all(tensor.is_meta for tensor in given):
                args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        out = func(*args, **kwargs)
        self._count_flops(func, args, kwargs, out)
        if not self._is_muted:
            for made in _tensors((out,)):
                self._track(made)
        return out

    def _count_flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops[self.label()._replace(use=self.phase)] += formula(*args, **kwargs, out_val=out)

    def add_flops(self, number: int) -> None:
        """Book FLOPs of a kernel that is no operation of torch's."""
        self.flops[self.label()._replace(use=self.phase)] += number

    def _real_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        """Book what a real process group is given; a planned one tells it itself (`heard`)."""
        size = 0
        for argument in reversed(args[:2]):
            tensors = list(_tensors((argument,)))
            if tensors:
                size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                break
        self._book(func.overloadpacket.__name__.strip("_"), size, ())


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors of an operation's arguments or results: themselves, or in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _one(dtype: torch.dtype) -> Any:
    """Return what the host reads of a meta tensor."""
    return 1.0 if dtype.is_floating_point else dtype is torch.bool or 1


def _on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape on meta."""
    if tensor.device.type == "meta":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class RecordedPhases(Phases):
    """The timer of a run whose phases a recorder follows."""

    def __init__(self, recorder: Recorder) -> None:
        """Follow the phases by a recorder; times are the host's."""
        super().__init__()
        self.recorder = recorder

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block's time, and what it does, as `name`."""
        with super().__call__(name), self.recorder.within(phase=name):
            self.recorder.start_phase(name)
            yield
