"""`tide train --dry-run`: what it prints can be run again, and what cannot run is refused with its key."""

import json

import pytest
import yaml

from tide_megatron.base.device import Device
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.train import summary
from tide_megatron.train.resolve import build_recipe, digest
from tide_megatron.train.summary import print_summary

DENSE = {
    "model_type": "a2d-qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MIXTURE = {
    **DENSE,
    "model_type": "llada2_moe",
    "partial_rotary_factor": 1.0,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "tie_word_embeddings": False,
}


@pytest.fixture
def tree(tmp_path):
    for name, config in {"student": DENSE, "teacher": MIXTURE}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return {
        "folder": "runs/x",
        "student": {
            "folder": str(tmp_path / "student"),
            "context": {"kind": "block_diffusion", "block_size": 8},
        },
        "teachers": {
            "big": {
                "folder": str(tmp_path / "teacher"),
                "context": {"kind": "bidirectional"},
                "layout": {"expert": 4},
            }
        },
        "data": {"train": "data/train"},
        "losses": {"ce": {"kind": "cross_entropy"}, "kl": {"kind": "kl", "teacher": "big", "weight": 4.0}},
        "steps": 10,
        "batch": {"samples": 16, "microbatch": 2},
    }


def test_what_is_printed_is_the_same_recipe(tree, capsys):
    recipe, resolved = build_recipe(tree)
    print_summary(recipe, resolved, 4)
    printed, said = capsys.readouterr()
    _, again = build_recipe(yaml.safe_load(printed))
    assert again == resolved
    assert f"digest {digest(resolved)}, 4 rank(s)" in said
    assert "16 samples an update = 4 rank(s) x 2 microbatch(es) x 2" in said
    rows = [" ".join(line.split()) for line in said.splitlines()]
    assert "student a2d-qwen3 block_diffusion 8 whole; 4 replica(s)" in rows
    assert "big llada2_moe bidirectional 32 expert 4; 4 replica(s)" in rows


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2, r"^teachers\.big\.layout \{expert=4\}: .*nearest legal layout is \{expert=2\}"),
        (3, r"^batch\.samples: 16 samples per update cannot be shared by 3 ranks"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(tree, world, words):
    recipe, resolved = build_recipe(tree)
    with pytest.raises(ConfigError, match=words):
        print_summary(recipe, resolved, world)


def test_bf16_on_a_gpu_that_does_not_have_it_is_refused_with_the_models_key(tree, monkeypatch):
    old = Device(type="cuda", index=0, backend="nccl", threads=1, name="Tesla T4", capability=(7, 5))
    monkeypatch.setattr(summary, "choose_device", lambda wanted: old)
    recipe, resolved = build_recipe(tree)
    print_summary(recipe, resolved, 4)  # auto is fp32 there
    tree["teachers"]["big"]["precision"] = "bf16"
    recipe, resolved = build_recipe(tree)
    with pytest.raises(
        ConfigError, match=r"^teachers\.big\.precision: 'bf16' needs .*Tesla T4 \(sm_75\); use"
    ):
        print_summary(recipe, resolved, 4)


def test_a_missing_model_folder_is_named(tree):
    recipe, resolved = build_recipe({**tree, "student": {**tree["student"], "folder": "nowhere"}})
    with pytest.raises(CheckpointError, match="nowhere: no such model folder"):
        print_summary(recipe, resolved, 4)
