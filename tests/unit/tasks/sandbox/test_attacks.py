"""Programs that try to get out: none harms the caller, its files or another program, whatever isolates it."""

from __future__ import annotations

import re

import pytest

from sandbox_attacks import ATTACKS, LIMITS, attack, bait
from tide_megatron.tasks.sandbox.errors import SandboxError
from tide_megatron.tasks.sandbox.sandbox import Sandbox, at_once

KINDS = ("namespaces", "bubblewrap", "filters")


def sandbox_of(kind):
    try:
        return Sandbox(kind, LIMITS)
    except SandboxError as fault:
        pytest.skip(str(fault))


def outcomes(kind, attacks):
    """Run all, two at a time, so that each has another program beside it."""
    sandbox = sandbox_of(kind)
    with bait() as aim:
        ends = at_once(lambda one: attack(sandbox, one, aim), attacks, 2)
        assert aim.untouched()
    return {one.name: end for one, end in zip(attacks, ends, strict=True) if not re.search(one.expected, end)}


@pytest.mark.parametrize("kind", KINDS)
def test_no_attack_gets_out(kind):
    assert outcomes(kind, [one for one in ATTACKS if not one.slow]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_attack_outlasts_its_time(kind):
    assert outcomes(kind, [one for one in ATTACKS if one.slow]) == {}
