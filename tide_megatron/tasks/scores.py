"""What answers are worth: a score with its 95 % interval, and the difference of two models by question.

A share of n questions that were answered right has Wilson's interval, which keeps its promise near 0 and 1
and for few questions, where the usual one (share +- 1.96 standard errors) does not. Scores that are no plain
right or wrong have Student's. Both speak about other questions of the same kind, not about other seeds or
base models. Two models that answered the same questions are compared question by question: what makes a
question hard drops out of the difference, so its interval is narrower than the two scores' own suggest.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tide_megatron.base.errors import DataError
from tide_megatron.evaluate.report import PairedDifference, paired_difference

Z95 = statistics.NormalDist().inv_cdf(0.975)
"""Two-sided 95 %."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanScore:
    """A mean score and its 95 % interval, all from 0 to 1."""

    mean: float
    low: float
    high: float
    questions: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> MeanScore:
        """Return the mean of scores of questions, each from 0 to 1.

        Raises:
            DataError: there are none.
        """
        if not scores:
            raise DataError("no question was answered, so there is no score")
        questions, mean = len(scores), math.fsum(scores) / len(scores)
        if all(score in (0.0, 1.0) for score in scores):
            low, high = wilson(mean, questions)
        else:
            low, high = paired_difference(scores, [0.0] * questions).ci95 if questions > 1 else (0.0, 1.0)
        return cls(mean=mean, low=max(0.0, low), high=min(1.0, high), questions=questions)

    def percent(self) -> str:
        """Return it in percent, with its interval: `48.8 [41.2, 56.4]`."""
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(share: float, questions: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a probability (Wilson 1927).

    Args:
        share: of the questions that were answered right, 0 to 1.
        questions: how many there were.
    """
    spread = Z95**2 / questions
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / questions + spread / (4 * questions))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedScores:
    """One model against another on the questions that both have answered."""

    difference: PairedDifference
    """Of the scores, 0 to 1."""
    better: int
    """Questions on which the first one scored higher."""
    worse: int

    @property
    def sign_test(self) -> float:
        """Probability of so uneven a split of the questions that they differ on, if neither is better."""
        uneven, both = min(self.better, self.worse), self.better + self.worse
        tail = sum(math.comb(both, k) for k in range(uneven + 1))
        return float(min(1.0, 2 * tail / 2**both))

    def summary(self) -> dict[str, Any]:
        """Return plain values for a result file."""
        low, high = self.difference.ci95
        return {
            "questions": self.difference.pairs,
            "difference": self.difference.mean,
            "interval": [low, high],
            "better": self.better,
            "worse": self.worse,
            "sign_test": self.sign_test,
        }


def compare(one: Mapping[str, float], other: Mapping[str, float]) -> PairedScores:
    """Compare two models by question.

    Args:
        one: question -> score.
        other: the same of the model it is compared with.

    Raises:
        DataError: they have no question in common.
    """
    shared = [name for name in one if name in other]
    if not shared:
        raise DataError("the two have no question in common; evaluate both on the same task")
    pairs = [(one[name], other[name]) for name in shared]
    return PairedScores(
        difference=paired_difference([a for a, _ in pairs], [b for _, b in pairs]),
        better=sum(a > b for a, b in pairs),
        worse=sum(a < b for a, b in pairs),
    )
