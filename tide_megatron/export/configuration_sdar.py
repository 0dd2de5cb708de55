"""What a `config.json` with `model_type: sdar` means: Qwen3's facts, and how blocks are denoised.

A copy of this file lies in every SDAR export. Servers that know the architecture still read the configuration
through transformers, which does not know the word; with `--trust-remote-code` it finds this class.
"""

from typing import Any

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):  # type: ignore[misc] # of a library without types
    """A Qwen3 that fills blocks of `block_size` tokens, those to predict shown as `mask_token_id`."""

    model_type = "sdar"

    def __getattr__(self, name: str) -> Any:
        """Give `rope_theta` under every release of transformers.

        From 5.0 on it is kept in `rope_parameters` alone, and SGLang's model of this architecture takes 10000
        where the attribute is missing.
        """
        parameters = vars(self).get("rope_parameters") or {}
        if name == "rope_theta" and name in parameters:
            return parameters[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")
