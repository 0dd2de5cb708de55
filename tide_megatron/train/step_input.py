"""What a step reads: made on the host from a rank's microbatches, one step ahead.

Noise, masked rows, views, links to teachers and this rank's counts are a few hundred small operations on
whole numbers. On a device they would be as many kernels, and several of them would make the host wait to
learn how many tokens are masked. On the host they need no device, so a thread makes the next step's while
this one computes, and they go to the device together (`base.transfer`). All of it is a pure function of where
the run stands: what was made ahead in vain is thrown away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from tide_megatron.base.transfer import moved
from tide_megatron.diffusion.batch import Batch, Noised
from tide_megatron.diffusion.views import View
from tide_megatron.head.gather import row_sizes
from tide_megatron.losses.base import Loss
from tide_megatron.losses.rows import Rows, rows_of
from tide_megatron.teachers.exchange import Request
from tide_megatron.teachers.teacher import Teacher
from tide_megatron.train.cost import needed_flops
from tide_megatron.train.student import Student


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInput:
    """One rank's share of a step, before anybody has exchanged anything."""

    noised: Sequence[Noised]
    """Microbatches; they stay on the host."""
    views: Sequence[View]
    """What the student reads of each."""
    rows: Sequence[Rows]
    """What the losses know of each."""
    requests: Mapping[str, Request]
    """What each teacher is asked."""
    numbers: Mapping[str, Sequence[float]]
    """What the other ranks have to know (`train.counts`), by section."""

    @classmethod
    def of(
        cls,
        batches: Sequence[Batch],
        noiser: Callable[[Batch], Noised],
        student: Student,
        teachers: Mapping[str, Teacher],
        losses: Mapping[str, Loss],
    ) -> StepInput:
        """Mask tokens and build what is read of them. Not a collective, and it asks no device.

        Args:
            batches: this rank's microbatches of one update, on the host.
            noiser: what masks.
            student: it and the teachers say how they read.
            teachers: by name.
            losses: by name; each counts what it will average over.
        """
        noised = [noiser(batch) for batch in batches]
        rows = [rows_of(example) for example in noised]
        requests = {name: teacher.request(noised) for name, teacher in teachers.items()}
        numbers: dict[str, Sequence[float]] = {
            "divisors": [float(sum(loss.count(example) for example in noised)) for loss in losses.values()],
            "totals": [
                float(sum(sum(example.batch.host_lengths) for example in noised)),
                float(sum(len(part.gold) for part in rows)),
            ],
            "flops": [float(needed_flops(student, teachers, noised))],
            "rows": [float(size) for part in rows for size in row_sizes(part)],
            "fingerprints": [float(example.batch.fingerprint) for example in noised],
        }
        for name, request in requests.items():
            numbers[f"views of {name}"] = [float(number) for number in request.numbers()]
            numbers[f"fingerprints of {name}"] = [float(number) for number in request.fingerprints]
        views = [student.view(example) for example in noised]
        return cls(noised=noised, views=views, rows=rows, requests=requests, numbers=numbers)

    def on(self, device: torch.device) -> StepInput:
        """Return it with all that models and losses read on a device, by one copy that nobody waits for."""
        views, rows, requests = moved((self.views, self.rows, self.requests), device)
        return dataclasses.replace(self, views=views, rows=rows, requests=requests)


class Ahead:
    """Makes what a run reads next in a thread of its own, while the step before computes.

    A fault of the data comes out where the step that it belongs to begins, on the rank that met it.
    """

    def __init__(self, make: Callable[[int], StepInput], update_samples: int) -> None:
        """Start with nothing.

        Args:
            make: gives the input of the update at a position (`Clock.consumed`), from that alone.
            update_samples: how far an update moves that.
        """
        self._make, self._update_samples = make, update_samples
        self._thread = ThreadPoolExecutor(1, "next step")
        self._position: int | None = None
        self._future: Future[StepInput] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread after what it is at, which nobody waits for where the run ends by an error."""
        self._thread.shutdown(wait=error is None, cancel_futures=True)

    def take(self, position: int, *, is_last: bool) -> StepInput:
        """Return the input of the update at a position, and begin with the one that is read after it.

        Args:
            position: where the run stands. Where it does not come to stand behind the last one (it went back
                to a checkpoint), what was made is thrown away.
            is_last: nothing is read after it.
        """
        future = self._future if position == self._position else None
        self._position = self._future = None
        found = self._make(position) if future is None else future.result()
        if not is_last:
            self._position = position + self._update_samples
            self._future = self._thread.submit(self._make, self._position)
        return found
