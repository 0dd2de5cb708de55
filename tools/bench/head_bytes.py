"""How many bytes the head loss moves for every logit, beside its matrix products: counted, not measured.

    python tools/bench/head_bytes.py --json        (minutes of one core; needs no GPU and no Triton)

For each loss and some mixtures, bf16 heads, per row and id of the vocabulary:

- `eager`: what torch's operations read and write of arrays with a number for each row and column, operation
  by operation. On CPU a tile of these stays in a core's cache; on a GPU it would not.
- `compiled`: what the kernels that Inductor writes for an H100 read and write of such arrays (`lowering`),
  and what the operations between them do. `reads` and `writes` count whole arrays of logits, `allocated`
  further arrays of that size.

The floor of a loss with one teacher on the same rows: both models' logits twice in, the derivative once out,
10 bytes; of one without a teacher 6.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from bench.lowering import Lowered, TritonCounter
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.alignment import RowAlignment
from tide_megatron.head import slab_passes
from tide_megatron.head.compiler import PassCompiler
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss, HeadOptions
from tide_megatron.losses.base import Loss
from tide_megatron.losses.calm import Calm, ReverseCalm
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.jensen_shannon import JensenShannon
from tide_megatron.losses.kl import Kl, ReverseKl
from tide_megatron.losses.rows import Rows
from tide_megatron.losses.tidal import Tidal

ROWS, IDS, COMPARED, WIDTH = 256, 4096, 4000, 16
"""Blocks of every kind are whole, and so are eager tiles."""
LARGE = ROWS * 512
"""Numbers from which on an array has one for each row and column (of a tile)."""
PRODUCTS = ("mm",)
OF_FEW = ("gather", "scatter_")
"""Operations that touch a number a row."""

SAME = {"teacher": "same", "shared_vocab_size": COMPARED}
CASES: dict[str, dict[str, Loss]] = {
    "cross_entropy": {"ce": CrossEntropy()},
    "kl": {"kl": Kl(**SAME)},
    "reverse_kl": {"reverse": ReverseKl(**SAME)},
    "tidal": {"tidal": Tidal(**SAME)},
    "jensen_shannon": {"js": JensenShannon(**SAME)},
    "calm, own tokens": {"calm": Calm(teacher="other")},
    "cross_entropy + tidal": {"ce": CrossEntropy(), "tidal": Tidal(**SAME)},
    "cross_entropy + reverse_calm, own tokens": {"ce": CrossEntropy(), "calm": ReverseCalm(teacher="other")},
    "cross_entropy + tidal of pairs": {
        "ce": CrossEntropy(),
        "tidal": Tidal(teacher="other", shared_vocab_size=COMPARED),
    },
    "cross_entropy + tidal + reverse_calm, two teachers": {
        "ce": CrossEntropy(),
        "tidal": Tidal(**SAME),
        "calm": ReverseCalm(teacher="other"),
    },
    "cross_entropy + kl + reverse_kl + tidal + jensen_shannon": {
        "ce": CrossEntropy(),
        "kl": Kl(**SAME),
        "reverse": ReverseKl(**SAME),
        "tidal": Tidal(**SAME),
        "js": JensenShannon(**SAME),
    },
}


@dataclasses.dataclass(kw_only=True)
class Moved:
    """What was moved so far, beside products."""

    bytes: int = 0
    reads: int = 0
    """Bytes of logits-sized arrays read by kernels."""
    writes: int = 0
    allocated: int = 0
    """Bytes of logits-sized arrays that kernels leave behind."""
    kernels: int = 0
    """Compiled kernels that touch such an array."""

    def add(self, lowered: Lowered) -> None:
        """Take in one call of a compiled graph."""
        for kernel in lowered.kernels:
            self.reads += sum(kernel.reads)
            self.writes += sum(kernel.writes)
            self.kernels += 1
        self.allocated += sum(lowered.allocated)
        self.bytes += sum(sum(kernel.reads) + sum(kernel.writes) for kernel in lowered.kernels)


class Operations(TorchDispatchMode):
    """Count the bytes of large operands of torch's operations but products and views."""

    def __init__(self, moved: Moved, large: int = LARGE) -> None:
        super().__init__()
        self.moved, self.large = moved, large
        self.largest = 0
        """Numbers of the largest array that an operation made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        given = [part for part in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        made = [part for part in torch.utils._pytree.tree_leaves(result) if isinstance(part, Tensor)]
        places = {part.untyped_storage().data_ptr() for part in given}
        fresh = [part for part in made if part.untyped_storage().data_ptr() not in places]
        self.largest = max([self.largest, *(part.numel() for part in fresh)])
        name = func.overloadpacket.__name__
        is_view = not fresh and not func._schema.is_mutable
        if not is_view and name not in PRODUCTS + OF_FEW:
            self.moved.bytes += self._size(given) + self._size(fresh or made)
        return result

    def _size(self, tensors: list[Tensor]) -> int:
        return sum(part.nbytes for part in tensors if part.numel() >= self.large)


class CountingCompiler(PassCompiler):
    """Passes that are lowered and counted, and run by torch's operations."""

    def __init__(self, moved: Moved, large: int = LARGE) -> None:
        self._counter = TritonCounter(large, moved.add)
        super().__init__(self._counter)

    def run(self, function: Callable[..., Any], options: Any, *inputs: Any) -> Any:
        """Call a function; what it does uncompiled is not counted."""
        with _disable_current_modes():
            return super().run(function, options, *inputs)


def call(losses: dict[str, Loss], compiler: PassCompiler | None) -> Callable[[], None]:
    """Return a forward and backward call of a head loss on random numbers.

    Two teachers may be asked: `same` on the student's rows, `other` with rows of its own, as many.
    """
    draw = torch.Generator().manual_seed(0)
    numbers = dict.fromkeys(("student", "same", "other"), ROWS)
    hidden, weight = (
        {name: torch.randn(size, WIDTH, generator=draw).bfloat16() for name, size in sizes.items()}
        for sizes in (numbers, dict.fromkeys(numbers, IDS))
    )
    hidden["student"].requires_grad_()
    every = torch.arange(ROWS)
    other = RowAlignment(
        gold=torch.randint(IDS, (numbers["other"],), generator=draw),
        chunk_sample=every % 2,
        student_rows=(every, every),
        teacher_rows=(every, every),
        pairs=(every[8:], every[:-8]),
        pair_sample=every[8:] % 2,
    )
    rows = Rows(
        gold=torch.randint(COMPARED, (ROWS,), generator=draw),
        sample=every % 2,
        time=torch.tensor([0.3, 0.8]),
        maskable=torch.tensor([ROWS, ROWS]),
        links={"other": other},
    )
    head = HeadLoss(losses, options=HeadOptions(compiled=compiler is not None))
    if compiler is not None:
        head.compiler = compiler
    student = HeadInput(hidden=hidden["student"], weight=weight["student"], gradient=torch.zeros(IDS, WIDTH))
    answers = {name: HeadInput(hidden=hidden[name], weight=weight[name]) for name in ("same", "other")}
    gathered = GatheredRows.alone(rows, dict.fromkeys(losses, 100.0))
    clock = Clock(step=37, total_steps=100)

    def work() -> None:
        head(student, answers, gathered, clock).objective.backward()

    return work


def count(losses: dict[str, Loss], *, compiled: bool) -> Moved:
    """Count one call, after one that filled the buffers and compiled what there is to compile."""
    moved = Moved()
    work = call(losses, CountingCompiler(moved) if compiled else None)
    with patch.object(slab_passes, "CPU_ROWS", ROWS):  # the whole slab, as on CUDA
        work()
        for field in dataclasses.fields(moved):
            setattr(moved, field.name, 0)
        with Operations(moved):
            work()
    return moved


def _row(losses: dict[str, Loss]) -> Iterator[tuple[str, float]]:
    logits = ROWS * IDS
    yield "eager_bytes", count(losses, compiled=False).bytes / logits
    found = count(losses, compiled=True)
    yield "compiled_bytes", found.bytes / logits
    yield "reads", found.reads / logits / 2
    yield "writes", found.writes / logits / 2
    yield "allocated", found.allocated / logits / 2
    yield "kernels", found.kernels


def main() -> None:
    """Count, print a table and, if asked, one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="*", default=[*CASES], choices=[*CASES], metavar="CASE")
    given = parser.parse_args()
    found = {}
    for name in given.only:
        losses = CASES[name]
        found[name] = dict(_row(losses))
        print(
            f"{name:58}" + "  ".join(f"{key} {value:.2f}" for key, value in found[name].items()), flush=True
        )
    if given.json:
        print(json.dumps({"rows": ROWS, "ids": IDS, "torch": torch.__version__, "cases": found}))


if __name__ == "__main__":
    main()
