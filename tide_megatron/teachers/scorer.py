"""Score a teacher where it lies: cut over ranks in its own layout, its head cut by vocabulary."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from tide_megatron.diffusion.batch import Noised
from tide_megatron.diffusion.views import trimmed_view
from tide_megatron.head.tiles import score_rows
from tide_megatron.parallel.collectives import gather_objects
from tide_megatron.parallel.exchange import gather_parts
from tide_megatron.parallel.vocab_group import VocabGroup
from tide_megatron.teachers.request import Request, num_rows
from tide_megatron.teachers.teacher import Teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherScorer:
    """A teacher that reads batches of its own tokens in the plain view; an `evaluate.likelihood.Scorer`."""

    teacher: Teacher
    group: VocabGroup

    def __call__(self, noised: Noised) -> tuple[Tensor, Tensor]:
        """Score this rank's microbatch. All ranks call it together and equally often.

        Returns:
            NLL in nats [rows] fp32 and whether the gold token is the most likely [rows] bool.
        """
        sight = self.teacher.sight
        view = trimmed_view(noised, sight.context, sight.mask_id)
        request = Request(views=[(view,)], fingerprints=[noised.batch.fingerprint])
        sizes = [request.sizes(numbers) for numbers in self._of_all(request.numbers())]
        (answer,) = self.teacher.answers(request, sizes)
        rows = [num_rows(rank[0]) for rank in sizes]
        gold = gather_parts(noised.batch.ids[noised.row_index], rows, self.group.group, "rows")
        nll, is_right = score_rows(answer, gold, self.group.group)
        mine = self.group.own(rows)
        return nll[mine], is_right[mine]

    def _of_all(self, numbers: list[int]) -> list[list[int]]:
        if self.group.group is None:
            return [numbers]
        return gather_objects(numbers, self.group.group)
