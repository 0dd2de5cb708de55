"""What a field says of itself, and which values are no mathematics."""

import dataclasses
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.options import MACHINE, STRICT, Paper, described, options_of, without_machine


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Inner:
    cut: Annotated[int, MACHINE] = 1
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Base:
    first: int
    """What comes
    first."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Outer(Base):
    part: Inner = Field(default_factory=Inner)
    named: dict[str, Inner] = Field(default_factory=dict)
    free: dict[str, Any] = Field(default_factory=dict)
    kind: Annotated[Literal["a", "b"], MACHINE, Paper("b")] = "a"
    number: Annotated[float | None, Paper("3")] = Field(default=None, gt=0)
    """A number."""
    device: Annotated[Inner, MACHINE] = Field(default_factory=Inner)


def test_a_field_says_all_of_itself():
    found = {option.name: option for option in options_of(Outer)}
    assert list(found) == ["first", "part", "named", "free", "kind", "number", "device"]
    assert (found["first"].is_required, found["first"].meaning) == (True, "What comes first.")
    assert (found["number"].default, found["number"].paper, found["number"].meaning) == (
        None,
        "3",
        "A number.",
    )
    assert found["part"].default == Inner()
    assert [option.nested for option in found.values()] == [None, Inner, Inner, None, None, None, Inner]
    assert [name for name, option in found.items() if option.is_machine] == ["kind", "device"]
    assert [name for name, option in found.items() if option.is_named] == ["named", "free"]


def test_mathematics_is_what_is_not_marked_at_any_depth():
    tree = {
        "first": 1,
        "part": {"cut": 2, "rate": 0.1},
        "named": {"x": {"cut": 3, "rate": 0.2}, "y": {"rate": 0.3}},
        "free": {"cut": 4, "kind": "c"},
        "kind": "b",
        "device": {"cut": 9},
        "unknown": {"cut": 5},
    }
    assert without_machine(tree, Outer) == {
        "first": 1,
        "part": {"rate": 0.1},
        "named": {"x": {"rate": 0.2}, "y": {"rate": 0.3}},
        "free": {"cut": 4, "kind": "c"},
        "unknown": {"cut": 5},
    }


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int | None, "whole number or null"),
        (Literal["x", "y"], "x or y"),
        (tuple[float, ...], "list of number"),
        (tuple[float, float], "[number, number]"),
        (dict[str, int], "by name"),
        (Inner, "section"),
        (Annotated[str, MACHINE], "text"),
    ],
)
def test_types_in_words(kind, words):
    assert described(kind) == words


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().cut = 3
