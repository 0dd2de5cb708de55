"""The recorded models: every key of their folders, through our loading, views and layers."""

import pytest
import torch

from goldens.models import one_rank_world, replay_models
from tests.unit.models.shapes import MIXTURE, build
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

FOLDERS = {
    "student_a2d_qwen3": {"logits_bd3lm", "logits_nomask", "logits_mask2d", "loss", "bd3lm_mask"},
    "teacher_wedlm_like": {"xt_x0_*logits", "x0_xt_*logits", "logits_native_causal"},
    "teacher_llada2_moe": {
        *("logits_bidir", "logits_blockcausal", "logits_mask4d_trainer", "logits_mask2d_is_causal"),
        *("hidden_*", "router_logits_*", "topk_idx_1", "moe_topk_idx", "moe_topk_weight", "moe_out*"),
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


def test_a_router_may_keep_several_groups():
    """The recorded mixture keeps one group of two; the folder that kept two of four is not in a clone."""
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(64, 8, generator=generator), torch.randn(8, generator=generator) / 4
    with one_rank_world():
        router = build(MIXTURE, make_groups(Layout())).decoder.layers[1].mlp.router
        router.expert_bias.copy_(bias)
        weights, chosen = router.routing(logits)
    scores = logits.sigmoid()
    rated = (scores + bias).view(64, 4, 2)
    kept = torch.zeros(64, 4).scatter(1, rated.sum(dim=2).topk(2).indices, 1.0).bool()
    best = rated.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(4).indices
    wanted = torch.zeros(64, 8).scatter(1, best, scores.gather(1, best))
    torch.testing.assert_close(weights, 2.5 * wanted / wanted.sum(dim=1, keepdim=True))
    assert torch.equal(chosen.bool(), wanted > 0)
