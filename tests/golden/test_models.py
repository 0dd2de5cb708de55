"""The recorded models: every key of their folders, through our loading, views and layers."""

import pytest

from goldens.models import replay_models

FOLDERS = {
    "student_a2d_qwen3": {"logits_bd3lm", "logits_nomask", "logits_mask2d", "loss", "bd3lm_mask"},
    "teacher_wedlm_like": {"xt_x0_*logits", "x0_xt_*logits", "logits_native_causal"},
    "teacher_llada2_moe": {
        "logits_bidir",
        "logits_blockcausal",
        "logits_mask4d_trainer",
        "hidden_*",
        "moe_out*",
    },
    "teacher_llada2_moe_g4": {
        "logits_bidir",
        "router_logits_*",
        "topk_idx_1",
        "moe_topk_idx",
        "moe_topk_weight",
    },
    "teacher_llada": {"logits_bidir", "logits_mask2d"},
    "teacher_llada_moe": {"logits_bidir"},
    "teacher_dream": {"logits_bidir_unshifted", "logits_shifted"},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_key_is_replayed(goldens, name):
    rows = replay_models(goldens / name)
    assert not [row for row in rows if row.status != "replayed"]
    assert FOLDERS[name] <= {row.label for row in rows}
