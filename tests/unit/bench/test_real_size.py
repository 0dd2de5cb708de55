"""The real-size bench in small: the same phases, a body of one narrow layer under a head of Qwen3's size."""

from bench.real_size import Size, run_phase

SMALL = Size(layers=1, hidden=16, feed_forward=32, heads=2, groups=1, head_dim=8, tokens=64)


def test_the_phases_run_one_after_the_other(tmp_path):
    """All but `write`, which is `verify` without the checks."""
    figures = {name: run_phase(name, tmp_path, SMALL) for name in ("make", "step", "verify")}
    assert figures["make"]["mask_id"] == 151_669, "as servers assume"
    assert figures["step"]["skipped"] == 0
    checks = figures["verify"]["checks"]
    assert all(check["is_fine"] for check in checks)
    assert {check["what"] for check in checks} == {"tensors", "logits", "contract", "servers", "tokenizer"}
    assert all(phase["peak_gib"] > 0.05 for phase in figures.values())
