"""What a `config.json` with `model_type: sdar` means: Qwen3's facts, and how blocks are denoised.

A copy of this file lies in every SDAR export. Servers that know the architecture still read the configuration
through transformers, which does not know the word; with `--trust-remote-code` it finds this class.
"""

from typing import Any

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):  # type: ignore[misc] # of a library without types
    """A Qwen3 that fills blocks of `block_size` tokens, those to predict shown as `mask_token_id`."""

    model_type = "sdar"

    def __init__(self, **options: Any) -> None:
        """Read config.json's keys; `rope_theta` is an attribute under every release of transformers.

        From 5.0 on transformers keeps it in `rope_parameters` alone, and SGLang's model of this architecture
        takes 10000 where the attribute is missing.
        """
        super().__init__(**options)
        parameters = getattr(self, "rope_parameters", None)
        if parameters:
            self.rope_theta = parameters["rope_theta"]
