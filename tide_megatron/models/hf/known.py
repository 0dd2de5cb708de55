"""Keys of config.json that change nothing a model computes: known by name, so that all others are questions.

A model that is newer than its reader says so by a key that the reader does not know. Such a key is refused,
unless its value is null, false, zero or empty, which is how files say that a feature is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tide_megatron.base.errors import ConfigError
from tide_megatron.models.hf.values import check_one_of, shown

Kinds = Mapping[str, tuple[type, ...]]
"""Key -> the types that its value may have; null is of every type."""

FLAG, NUMBER, TEXT, LIST, OBJECT = (bool,), (float,), (str,), (list,), (dict,)


def _all(kinds: tuple[type, ...], words: str) -> dict[str, tuple[type, ...]]:
    return dict.fromkeys(words.split(), kinds)


HARMLESS: Kinds = {
    # What the file is, and how transformers opens it.
    **_all(
        TEXT,
        "name_or_path transformers_version tokenizer_class torch_dtype dtype problem_type finetuning_task "
        "prefix unsloth_version framework attn_implementation",
    ),
    **_all(OBJECT, "auto_map id2label label2id task_specific_params"),
    **_all(LIST, "architectures keys_to_ignore_at_inference"),
    **_all(NUMBER, "num_labels model_max_length seq_length"),
    # What it returns beside the logits, and how it computes them.
    **_all(
        FLAG,
        "use_cache output_attentions output_hidden_states output_router_logits return_dict use_return_dict "
        "torchscript use_bfloat16 tf_legacy_loss is_decoder flash_attention gradient_checkpointing "
        "fuse_cross_entropy micro_forward skip_checkpoint use_deepep debug unsloth_fixed",
    ),
    **_all(NUMBER, "chunk_size_feed_forward pretraining_tp ep_size"),
    # Losses of its own training.
    **_all(NUMBER, "router_aux_loss_coef router_z_loss_coef mtp_loss_scaling_factor"),
    # A window that `use_sliding_window` switches on, which is refused; and how a model is sampled.
    **_all(NUMBER, "sliding_window max_window_layers block_size"),
    **_all(
        NUMBER,
        "max_length min_length max_new_tokens min_new_tokens num_beams num_beam_groups num_return_sequences "
        "temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty "
        "encoder_repetition_penalty diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
        "penalty_alpha guidance_scale max_time",
    ),
    **_all(
        FLAG,
        "do_sample output_scores output_logits return_dict_in_generate remove_invalid_values "
        "renormalize_logits",
    ),
    **_all(LIST, "bad_words_ids suppress_tokens begin_suppress_tokens exponential_decay_length_penalty"),
    "early_stopping": (bool, str),
    "chat_template": (str, list),
}
"""Keys of every model."""
_ENDINGS: Kinds = {
    "_token_id": (int, list),
    "_token_ids": (list,),
    "_token": (str, dict),
}
"""Ends of keys that name special tokens."""


def refuse_unknown(config: Mapping[str, Any], read: Iterable[str], harmless: Kinds) -> None:
    """Refuse the keys of a config.json that nobody read, unless they change nothing.

    Args:
        config: parsed config.json.
        read: keys that were read.
        harmless: further keys that change nothing in this family.

    Raises:
        ConfigError: naming the first key that might make another model, or a harmless one of another type.
    """
    known = {*read}
    for key, value in config.items():
        if key in known or key.startswith("_"):
            continue
        kinds = harmless.get(key) or HARMLESS.get(key) or _of_token(key)
        if kinds is not None:
            check_one_of(value, kinds, key)
        elif value:
            raise ConfigError(
                f"config.json: {key}: {shown(value)} is not known for model_type "
                f"{config.get('model_type')!r} and may change what the model computes; remove the key if it "
                "does not, else this model cannot be read"
            )


def _of_token(key: str) -> tuple[type, ...] | None:
    return next((kinds for ending, kinds in _ENDINGS.items() if key.endswith(ending)), None)
