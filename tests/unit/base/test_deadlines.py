"""How long a rank may show nothing new: `hang_seconds` times a stated factor, or the phase's own deadline."""

import dataclasses

import pytest

from tide_megatron.base.deadlines import NO_DEADLINES, Deadlines
from tide_megatron.base.phases import PHASES


def later(deadlines, phase):
    return deadlines.limit(phase, 300.0, is_first_update=False)


def first(deadlines, phase):
    return deadlines.limit(phase, 300.0, is_first_update=True)


def test_every_phase_of_a_run_has_a_deadline():
    assert tuple(field.name for field in dataclasses.fields(Deadlines)) == PHASES


def test_without_deadlines_a_factor_holds():
    slow = ("evaluate", "checkpoint", "")
    for phase in (*PHASES, ""):
        wanted = (1200.0, "4 x hang_seconds") if phase in slow else (300.0, "hang_seconds")
        assert later(NO_DEADLINES, phase) == wanted
        assert first(NO_DEADLINES, phase) == (1200.0, "4 x hang_seconds")


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_has_its_own_and_the_first_update_compiles(phase):
    own = Deadlines(**{phase: 60.0})
    compiles_nothing = phase in ("data", "evaluate", "checkpoint")
    key = f"deadlines.{phase}"
    assert later(own, phase) == (60.0, key)
    assert first(own, phase) == ((60.0, key) if compiles_nothing else (240.0, f"4 x {key}"))
    for other in {*PHASES, ""} - {phase}:
        assert later(own, other) == later(NO_DEADLINES, other)


def test_others_may_wait_as_long_as_one_may_read():
    """A rank that reads for ten minutes lets the others stand in their phases for as long."""
    slow_disk = Deadlines(data=600.0, head=20.0)
    assert later(slow_disk, "exchange") == (600.0, "deadlines.data")
    assert later(slow_disk, "head") == (20.0, "deadlines.head")
    assert later(slow_disk, "checkpoint") == (1200.0, "4 x hang_seconds")
    assert later(Deadlines(checkpoint=9000.0), "exchange") == (300.0, "hang_seconds")


def test_a_lost_node_is_missed_before_those_that_wait_for_it_are_late():
    assert NO_DEADLINES.shortest_wait(300.0) == 300.0
    assert Deadlines(exchange=20.0, checkpoint=900.0).shortest_wait(300.0) == 20.0
    assert Deadlines(data=2.0).shortest_wait(300.0) == 300.0, "nobody waits for a node there"
