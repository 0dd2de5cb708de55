"""config.json of the paper's models at their real sizes (spec section 6), for benches and checks."""

from __future__ import annotations

from typing import Any

QWEN3_06B: dict[str, Any] = {
    "model_type": "a2d-qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
"""The student's: 0.6 billion parameters."""
WEDLM_8B: dict[str, Any] = QWEN3_06B | {
    "model_type": "wedlm",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 12_288,
    "tie_word_embeddings": False,
    "qk_norm": True,
}
"""The dense teacher's."""
LLADA2_MINI: dict[str, Any] = {
    "model_type": "llada2_moe",
    "num_hidden_layers": 20,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "vocab_size": 157_184,
    "max_position_embeddings": 32_768,
    "rope_theta": 600_000.0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
"""The mixture that teaches: 16 billion parameters."""
FOLDERS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b-bd3lm": QWEN3_06B,
    "wedlm-8b": WEDLM_8B,
    "llada2-mini": LLADA2_MINI,
}
"""By the names that the paper's run files give their folders (docs/paper_run.md)."""
