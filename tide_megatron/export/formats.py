"""The forms a student goes out in: what each reader expects of `config.json` and of the weights.

All three have Qwen3's tensors under Qwen3's names. What readers do was read in their public sources:

- the dLLM library registers `a2d-qwen3` with transformers itself, takes the mask token from the tokenizer;
- SGLang takes mask id and block size of `SDARForCausalLM` from a table of its own (151669 and 4), the block
  size also from the YAML file of `--dllm-algorithm-config`; LMDeploy has the mask id built in and takes the
  block length from `--dllm-block-length`. Other engines read `mask_token_id` and `block_size`;
- SGLang looks for a separate `lm_head.weight` in an SDAR model also where the head is tied, and published
  SDAR models (1.7B, 4B) are untied where Qwen3's are tied: the SDAR form writes the tied head out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tide_megatron.base.errors import ConfigError, nearest
from tide_megatron.export import configuration_sdar
from tide_megatron.models.arch.qwen3 import Qwen3
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.hf.safetensors import Plan, TensorSpec
from tide_megatron.models.params import hf_shapes

HEAD = "lm_head.weight"
STORED = "stored"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, STORED: None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One form of an exported student."""

    name: str
    """The word after `--format`, and the folder's name among several."""
    model_type: str
    architecture: str
    """What `architectures` names: the class that readers look for."""
    readers: str
    """Who loads it, in a few words."""
    serves_blocks: bool = False
    """`config.json` names block size and mask token, and servers have files of their own."""
    unties: bool = False
    """A tied head is written as a tensor of its own."""
    mask_id: int | None = None
    """The mask token that servers of this form assume, whatever `config.json` says."""

    def sources(self, architecture: Qwen3) -> dict[str, str]:
        """Return each tensor's name in the export -> its name in the student's folder."""
        written_out = {HEAD: architecture.embedding_name} if self.unties and architecture.tied else {}
        return {name: name for name in hf_shapes(architecture)} | written_out

    def plan(self, architecture: Qwen3, source: HfFolder, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
        """Return what will be written, from the headers of the student's folder alone.

        Args:
            architecture: of the student.
            source: its folder.
            dtype: of all tensors; None: each keeps its own.
        """
        shapes = hf_shapes(architecture)
        return {
            name: TensorSpec(shapes[origin], dtype or source.dtype(origin))
            for name, origin in self.sources(architecture).items()
        }

    def read(self, architecture: Qwen3, source: HfFolder, plan: Plan) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of an export from the student's folder, in the plan's order and dtypes."""
        origins = self.sources(architecture)
        for name, spec in plan.items():
            yield name, source.read(origins[name]).to(spec.dtype)

    def is_exact(self, architecture: Qwen3, source: HfFolder, plan: Plan) -> bool:
        """Say whether every tensor goes out without rounding."""
        origins = self.sources(architecture)
        return all(
            torch.promote_types(spec.dtype, source.dtype(origins[name])) == spec.dtype
            for name, spec in plan.items()
        )

    def config(
        self, architecture: Qwen3, special: dict[str, int], block_size: int | None, dtype: str
    ) -> dict[str, Any]:
        """Return config.json, from what the model is and nothing else that its folder said.

        Args:
            architecture: of the student.
            special: ids of special tokens, `mask` among them.
            block_size: tokens; only forms that serve blocks need it.
            dtype: of the weights, as torch names it.
        """
        config = {
            "architectures": [self.architecture],
            **architecture.common_hf(),
            "model_type": self.model_type,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_scaling": None,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": architecture.layers,
            "use_cache": True,
            **{f"{name}_token_id": number for name, number in special.items() if name != "mask"},
            "torch_dtype": dtype,
        }
        if self.unties:
            config["tie_word_embeddings"] = False
        if self.serves_blocks:
            config |= {
                "auto_map": {"AutoConfig": f"{configuration_sdar.__name__.rpartition('.')[2]}.SDARConfig"},
                "block_size": block_size,
                "mask_token_id": special["mask"],
            }
        return config


FORMATS: dict[str, ExportFormat] = {
    form.name: form
    for form in (
        ExportFormat(
            name="a2d-qwen3",
            model_type="a2d-qwen3",
            architecture="A2DQwen3LMHeadModel",
            readers="the dLLM and TIDE libraries",
        ),
        ExportFormat(
            name="sdar",
            model_type="sdar",
            architecture="SDARForCausalLM",
            readers="SGLang, LMDeploy",
            serves_blocks=True,
            unties=True,
            mask_id=151669,
        ),
        ExportFormat(
            name="qwen3",
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            readers="transformers, vLLM: everything that knows Qwen3",
        ),
    )
}
"""`tide export --format <key>` writes the value."""


def chosen_dtype(word: str) -> torch.dtype | None:
    """Return the dtype of an export; None: each tensor keeps its own.

    Raises:
        ConfigError: for another word than bf16, fp32 and stored.
    """
    if word not in _DTYPES:
        raise ConfigError(f"--dtype: {word!r} is unknown; {nearest(word, _DTYPES)}")
    return _DTYPES[word]
