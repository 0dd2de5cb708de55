"""Replays with two tokenizations: which reference bugs excuse a difference, and that nothing else does."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from goldens.aligned import SCATTER, UNEQUAL, replay_aligned_steps
from goldens.cross import OVERLAP, replay_cross_steps
from tests.golden.other_sides import CROSS_OVERLAP, write_aligned_steps, write_cross_steps


@pytest.fixture
def overlapping(tmp_path):
    """Write a file whose last sample has two ranges that overlap."""
    path = tmp_path / "step_cross.npz"
    write_cross_steps(path, torch.Generator().manual_seed(5), CROSS_OVERLAP)
    return path


def change(path, **arrays):
    """Store a file again with some arrays changed."""
    np.savez(path, **{**dict(np.load(path)), **arrays})


def status(rows):
    """Say what became of each case, ids and numbers of all its forms together."""
    cases = {}
    for row in rows:
        cases.setdefault(re.split("[:,]", row.label)[0], set()).add(row.status)
    return cases


def test_overlapping_ranges_differ_only_where_noise_makes_them_meet(overlapping):
    rows = replay_cross_steps(overlapping)
    assert {row.note for row in rows if row.status == "differs"} == {OVERLAP}
    found = {case: kinds for case, kinds in status(rows).items() if case.startswith("case")}
    assert not any("failed" in kinds for kinds in found.values())
    assert {"replayed"} in found.values()
    assert any("differs" in kinds for kinds in found.values())


def test_overlap_excuses_no_case_that_it_did_not_touch(overlapping):
    found = status(replay_cross_steps(overlapping))
    untouched = next(case for case, kinds in found.items() if kinds == {"replayed"} and "case" in case)
    change(overlapping, **{f"{untouched}_loss": np.load(overlapping)[f"{untouched}_loss"] + 1e-3})
    assert "failed" in status(replay_cross_steps(overlapping))[untouched]


def test_a_chunk_with_a_gap_is_refused(overlapping):
    student = np.load(overlapping)["in_alignment_matrix_student"]
    student[0, 5, 2] = False
    change(overlapping, in_alignment_matrix_student=student)
    with pytest.raises(ValueError, match="gap"):
        replay_cross_steps(overlapping)


@pytest.fixture
def aligned(tmp_path):
    path = tmp_path / "step_aligned.npz"
    write_aligned_steps(path, torch.Generator().manual_seed(3))
    return path


def hidden_pairs(path):
    """Return (sample, slot) of pairs that every case hides, or none does, by case."""
    arrays = dict(np.load(path))
    found = {}
    for case in json.loads(str(arrays["cases_json"])):
        tag = case["tag"]
        time = 1e-3 + (1 - 1e-3) * arrays[f"{tag}_u0"]
        hidden = (arrays[f"{tag}_u1"] < time[:, None]) & (arrays["in_labels"] != -100)
        used = np.arange(arrays["in_align_student"].shape[1]) < arrays["in_n_aligned"][:, None]
        found[tag] = np.take_along_axis(hidden, arrays["in_align_student"], 1) & used
    return found


def verdicts(path, sample, slot, bug):
    """Replay a file whose pair was spoilt; return the verdicts where something changed.

    Only cases that hide the pair may be excused by `bug`.
    """
    pairs = hidden_pairs(path)
    found = set()
    for row in replay_aligned_steps(path):
        tag = re.split("[:,]", row.label)[0]
        if tag in pairs and row.status != "replayed":
            excused = bool(pairs[tag][sample, slot])
            assert (row.status, row.note == bug) == ("differs" if excused else "failed", excused), row
            found.add(row.status)
    return found


def some_pair(path):
    """Find a pair of a sample with padded slots that some cases hide and others do not."""
    share = sum(pairs.astype(int) for pairs in hidden_pairs(path).values())
    padded = np.load(path)["in_n_aligned"] < share.shape[1]
    return np.argwhere((share > 0) & (share < len(hidden_pairs(path))) & padded[:, None])[0]


def test_unequal_pairs_differ_only_where_they_are_hidden(aligned):
    sample, slot = some_pair(aligned)
    arrays = dict(np.load(aligned))
    place, ids = arrays["in_align_student"][sample, slot], arrays["in_input_ids"]
    ids[sample, place] = (ids[sample, place] + 1) % 11
    change(aligned, in_input_ids=ids)
    assert verdicts(aligned, sample, slot, UNEQUAL) == {"differs", "failed"}


def test_the_scatter_bug_needs_an_aligned_position_zero_and_a_padded_slot(aligned):
    sample, slot = some_pair(aligned)
    arrays = dict(np.load(aligned))
    others, places = arrays["in_teacher_input_ids"], arrays["in_align_teacher"]
    others[sample, 0] = others[sample, places[sample, slot]]
    places[sample, slot] = 0
    change(aligned, in_teacher_input_ids=others, in_align_teacher=places)
    assert verdicts(aligned, sample, slot, SCATTER) == {"differs", "failed"}
