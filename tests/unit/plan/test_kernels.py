"""Kernels of CUDA in a plan: what they keep and compute."""

import torch

from tide_megatron.diffusion.mask import Context, dense_mask
from tide_megatron.plan.kernels import PlannedCompiler, PlannedFlex
from tide_megatron.plan.recorder import Label, RecordedPhases, Recorder

SAMPLES, HEADS, GROUPS, LENGTH, WIDTH = 2, 4, 2, 64, 16
CONTEXT = Context(kind="block_diffusion", block_size=16)


def test_attention_keeps_its_answer_and_a_number_a_query_and_head():
    recorder = Recorder()
    phases = RecordedPhases(recorder)
    tokens = CONTEXT.parts * LENGTH
    with recorder, phases("student"):
        query = torch.empty(
            SAMPLES, HEADS, tokens, WIDTH, dtype=torch.bfloat16, device="meta"
        ).requires_grad_()
        key, value = (
            torch.empty(SAMPLES, GROUPS, tokens, WIDTH, dtype=torch.bfloat16, device="meta").requires_grad_()
            for _ in range(2)
        )
        before = recorder.total
        kernel = PlannedFlex("student", recorder)(CONTEXT, LENGTH, None, torch.device("cpu"))
        answer = kernel(query, key, value)
        assert recorder.total - before == query.numel() * 2 + SAMPLES * HEADS * tokens * 4
    with recorder, phases("backward"):
        answer.sum().backward()
    assert query.grad.shape == query.shape
    assert key.grad.shape == key.shape
    pairs = SAMPLES * HEADS * int(dense_mask(CONTEXT, LENGTH).sum())
    forward, backward = (recorder.flops[Label("student", phase)] for phase in ("student", "backward"))
    assert forward == 2 * 2 * pairs * WIDTH
    assert backward == 5 * 2 * pairs * WIDTH


def test_a_compiled_pass_has_no_temporaries():
    recorder = Recorder()

    def passed(factor, logits):
        return (logits.float() * factor).exp().sum(-1)

    with recorder:
        logits = torch.empty(8, 1024, dtype=torch.bfloat16, device="meta")
        sums = PlannedCompiler(recorder).run(passed, (2.0,), logits)
    assert max(peak.num_bytes for peak in recorder.peaks.values()) == logits.nbytes + sums.nbytes
