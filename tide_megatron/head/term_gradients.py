"""What each term of the objective asks of the student: its gradient at the input of the head.

The input is the student's hidden rows after the final norm, where the terms meet for the last time before one
gradient of their sum goes back through the body. What is measured there is exact in any layout: rows belong
to one rank each, so products of gradients are sums over rows, and need no gradient of a weight. It says how
much the terms ask for and whether they agree, row by row; the body may weigh rows differently.

Each term is evaluated once more by itself, without the head weight's gradient: three products of four.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_megatron.base.clock import Clock
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.parallel.collectives import sum_over
from tide_megatron.parallel.exchange import COMM_STATS


class TermGradients:
    """Scalar products of the terms' gradients, added up over the microbatches of an update."""

    def __init__(self, head: HeadLoss) -> None:
        """Start with nothing measured.

        Args:
            head: the run's.
        """
        self._terms = {name: head.of_term(name) for name in head.losses}
        self._products: Tensor | None = None

    def add(
        self, student: HeadInput, teachers: Mapping[str, HeadInput], rows: GatheredRows, clock: Clock
    ) -> None:
        """Measure one microbatch. All ranks of the vocabulary group call it together; no gradient is left.

        Args:
            student: as the head loss takes it; what hangs on its graph is not touched.
            teachers: likewise.
            rows: likewise.
            clock: where the run stands.
        """
        found = []
        with COMM_STATS.apart(), torch.enable_grad():
            for term in self._terms.values():
                hidden = student.hidden.detach().float().requires_grad_()
                own = dataclasses.replace(
                    student, hidden=hidden, weight=student.weight.detach(), gradient=None, rows_only=True
                )
                term(own, teachers, rows, clock).objective.backward()  # type: ignore[no-untyped-call]
                found.append(torch.zeros_like(hidden) if hidden.grad is None else hidden.grad)
        gradients = torch.stack(found).flatten(1).double()  # [terms, rows x hidden size]
        products = gradients @ gradients.T
        self._products = products if self._products is None else self._products + products

    def take(self, group: ProcessGroup | None) -> dict[str, float]:
        """Add up all ranks' products. All ranks that share the data call it together.

        Args:
            group: they, each with rows of its own.

        Returns:
            `gradient_norm/TERM`, of the term as it enters the objective, with its weight; and
            `gradient_cosine/TERM` with the first cross-entropy. What is 0 has no direction and is left out.
        """
        assert self._products is not None, "no microbatch was measured"
        products = sum_over(self._products, group).tolist()
        names = list(self._terms)
        norms = {name: products[place][place] ** 0.5 for place, name in enumerate(names)}
        kinds = {name: term.losses[name] for name, term in self._terms.items()}
        gold = next((name for name, loss in kinds.items() if isinstance(loss, CrossEntropy)), None)
        found = {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        for place, name in enumerate(names):
            if gold is not None and name != gold and norms[name] and norms[gold]:
                cosine = products[place][names.index(gold)] / (norms[name] * norms[gold])
                found[f"gradient_cosine/{name}"] = cosine
        return found
