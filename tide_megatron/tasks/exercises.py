"""Exercises with one exact answer each: sums, sorting, reversing, rewriting.

    What is 27 + 41?          68
    Sort DBCA                 ABCD
    Reverse DBCA              ACBD
    Replace A by C in DABA    DCBC

Short enough for models of a hundred thousand weights, which learn it in minutes on a CPU. Likelihood rewards
calibration; an exercise asks what a user sees of a model, greedy replies. Nothing is stored: questions are
drawn from a seed, and a question's split is a pure function of its text (a hash), so what is trained on and
what is held out cannot meet, whatever seeds they are drawn from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.decode.options import Decoding
from tide_megatron.tasks.task import Judged, Question

SPLITS: Mapping[str, int] = {"train": 70, "dev": 85, "test": 100}
"""Upper ends on a scale of 100 that questions hash to."""
LETTERS = "ABCDEFGH"
MOST_DRAWS = 5
"""For one exercise that is new; after so many on average there are hardly any left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exercise:
    """A question with its only right answer."""

    kind: str
    question: str
    answer: str
    same_as: str = ""
    """The question that decides its split, where another one asks the same."""

    @property
    def split(self) -> str:
        """The split that it belongs to, whatever it is drawn from."""
        return split_of(self.same_as or self.question)

    def chat(self) -> list[dict[str, str]]:
        """Return it as a chat to learn from."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


def add(source: random.Random) -> Exercise:
    """Draw a sum of two numbers of two digits that needs no carrying."""
    tens, units = source.randint(1, 8), source.randint(0, 9)
    first = 10 * tens + units
    second = 10 * source.randint(1, 9 - tens) + source.randint(0, 9 - units)
    return Exercise(
        kind="add",
        question=f"What is {first} + {second}?",
        answer=str(first + second),
        same_as=f"{min(first, second)} + {max(first, second)}",
    )


def sort(source: random.Random) -> Exercise:
    """Draw letters to be put in the order of the alphabet."""
    letters = _letters(source)
    return Exercise(kind="sort", question=f"Sort {letters}", answer="".join(sorted(letters)))


def reverse(source: random.Random) -> Exercise:
    """Draw letters to be written from the last to the first."""
    letters = _letters(source)
    return Exercise(kind="reverse", question=f"Reverse {letters}", answer=letters[::-1])


def replace(source: random.Random) -> Exercise:
    """Draw letters of which one, wherever it stands, becomes another."""
    letters = _letters(source)
    old = source.choice(letters)
    new = source.choice(LETTERS.replace(old, ""))
    question = f"Replace {old} by {new} in {letters}"
    return Exercise(kind="replace", question=question, answer=letters.replace(old, new))


KINDS: tuple[Callable[[random.Random], Exercise], ...] = (add, sort, reverse, replace)


def _letters(source: random.Random) -> str:
    return "".join(source.choices(LETTERS, k=source.randint(3, 5)))


def split_of(question: str) -> str:
    """Return the split that a question's hash falls into."""
    place = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 100
    return next(split for split, end in SPLITS.items() if place < end)


def draw(split: str, seed: int) -> Iterator[Exercise]:
    """Yield a split's exercises without end, the kinds in turn; one may come again.

    None holds its own answer (letters that are in order already): copying is never right.

    Raises:
        ConfigError: an unknown split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: {split!r} is unknown; {nearest(split, SPLITS)}")
    source = random.Random(f"{split} {seed}")
    for kind in itertools.cycle(KINDS):
        exercise = kind(source)
        while exercise.split != split or exercise.answer in exercise.question:
            exercise = kind(source)
        yield exercise


def distinct(split: str, seed: int, count: int) -> list[Exercise]:
    """Return different exercises of a split, equally many of each kind.

    Args:
        split: a word of `SPLITS`.
        seed: of the draws.
        count: how many; a multiple of the number of kinds.

    Raises:
        ConfigError: a split or count that cannot be, or more than hardly any kind has.
    """
    share, rest = divmod(count, len(KINDS))
    if share < 1 or rest:
        raise ConfigError(f"count: {count} is no multiple of {len(KINDS)}, the number of kinds")
    found: dict[str, dict[str, Exercise]] = {kind.__name__: {} for kind in KINDS}
    for one in itertools.islice(draw(split, seed), MOST_DRAWS * count):
        if len(found[one.kind]) < share:
            found[one.kind].setdefault(one.question, one)
        if all(len(of_kind) == share for of_kind in found.values()):
            return [
                one for turn in zip(*(kind.values() for kind in found.values()), strict=True) for one in turn
            ]
    raise ConfigError(f"count: {count} is more than split {split} has in equal shares; ask for fewer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exercises:
    """Held-out exercises, scored by exact match."""

    split: str = "test"
    seed: int = 0
    count: int = 1000
    """How many questions, a quarter of each kind."""

    @property
    def name(self) -> str:
        """Name the task."""
        return "exercises"

    @property
    def decoding(self) -> Decoding:
        """Greedy, one token a step: the longest answer has five letters and an end token."""
        return Decoding(new_tokens=8)

    def questions(self) -> list[Question]:
        """Return the questions; the same seed gives the same ones everywhere."""
        return [
            Question(
                name=exercise.question,
                messages=({"role": "user", "content": exercise.question},),
                data={"kind": exercise.kind, "answer": exercise.answer},
            )
            for exercise in distinct(self.split, self.seed, self.count)
        ]

    def judge(self, question: Question, reply: str) -> Judged:
        """Compare a reply with the answer; white space around it does not count."""
        answer = question.data["answer"]
        if reply.strip() == answer:
            return Judged(score=1.0, why="right")
        return Judged(score=0.0, why=f"the answer is {answer}")
