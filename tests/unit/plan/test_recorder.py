"""The recorder: what is alive and whose, FLOPs by phase, host tensors beside meta ones."""

import pytest
import torch

from tide_megatron.plan.recorder import Label, RecordedPhases, Recorder


def test_peaks_are_by_phase_and_forget_what_died():
    recorder = Recorder()
    phases = RecordedPhases(recorder)
    with recorder:
        with phases("student"):
            kept = torch.empty(256, dtype=torch.float32, device="meta")
            brief = torch.empty(1024, dtype=torch.bfloat16, device="meta")
            del brief
        with phases("head"):
            more = kept + 1
    assert recorder.peaks["student"].num_bytes == 1024 + 2048
    assert recorder.peaks["head"].num_bytes == 2048
    assert recorder.peaks["head"].by_label == {
        Label("student", "activations"): 1024,
        Label("head", "slabs"): 1024,
    }
    del kept, more
    assert recorder.total == 0
    assert not +recorder.live


def test_views_are_not_counted_twice_and_adopted_bytes_change_hands():
    recorder = Recorder()
    with recorder:
        whole = torch.empty(64, device="meta")
        part = whole[:8]
    recorder.adopt([part], Label("student", "weights"))
    assert +recorder.live == {Label("student", "weights"): 256}


def test_what_a_compiled_kernel_spells_out_is_not_counted_but_its_result_is():
    recorder = Recorder()
    with recorder:
        given = torch.empty(64, device="meta")
        with recorder.muted():
            result = (given + 1) * 2
        recorder.adopt([result], recorder.label())
    assert recorder.total == 512
    assert max(peak.num_bytes for peak in recorder.peaks.values()) == 512


def test_flops_are_the_products():
    recorder = Recorder()
    phases = RecordedPhases(recorder)
    with recorder, phases("teacher"), recorder.within(owner="llada"):
        torch.empty(3, 5, device="meta") @ torch.empty(5, 7, device="meta")
        rows, matrices = torch.empty(8, 16, device="meta"), torch.empty(2, 16, 24, device="meta")
        if hasattr(torch, "_grouped_mm"):
            ends = torch.tensor([4, 8], dtype=torch.int32)
            torch._grouped_mm(rows.bfloat16(), matrices.bfloat16(), offs=ends)
    grouped = 2 * 8 * 16 * 24 if hasattr(torch, "_grouped_mm") else 0
    assert recorder.flops == {Label("llada", "teacher"): 2 * 3 * 5 * 7 + grouped}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_number_that_the_host_asks_for_is_one(dtype):
    with Recorder():
        assert torch.empty((), dtype=dtype, device="meta").item() == 1


def test_host_tensors_stay_real_and_stand_beside_meta_ones():
    row = torch.tensor([2, 0])
    host = torch.zeros(2)
    with Recorder():
        picked = torch.empty(3, 4, device="meta").index_select(0, row)
        host[0] = picked.sum()
        host[1] = 5.0
    assert picked.is_meta
    assert picked.shape == (2, 4)
    assert host.tolist() == [0.0, 5.0]
