"""What a model is, read from a Hugging Face `config.json`: shape, switches, the names of its weights.

An `Architecture` knows numbers and names only: no process group, no device, no megatron. `spec.py` says it in
megatron-core's words, `params.py` lists its weights, `build.py` makes the model. A new one is a file with a
subclass in `arch/` and a line in `arch/__init__.py`.

A config switch that would change the mathematics and is not implemented, or not known, is refused by name.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, Literal

from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.mask import Context, allowed_pairs
from tide_megatron.models.hf.config import Activation, ConfigReader, HfConfig
from tide_megatron.models.hf.known import Kinds

Gated = tuple[str, str, str]
"""Names of the gate, up and down projections of a gated feed-forward block."""


_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|masked_bias|causal_mask|position_ids)$"
)
"""Tables that older code saved with the weights, though config.json alone decides what is in them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Hugging Face names without `.weight` or `.bias`; the defaults are those of Qwen's and most later files.

    Names inside a layer are relative to `layer`.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{layer}."
    """Prefix of a layer; `{layer}` is its number."""
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Query, key, value; or one name where they are one matrix: all queries, all keys, all values."""
    attention_out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    feed_forward_norm: str = "post_attention_layernorm"
    feed_forward: Gated = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    router: str = "mlp.gate"
    router_bias: str = "mlp.gate.expert_bias"
    """In full."""
    expert: Gated = (
        "mlp.experts.{expert}.gate_proj",
        "mlp.experts.{expert}.up_proj",
        "mlp.experts.{expert}.down_proj",
    )
    """`{expert}` is the expert's number."""
    merged_experts: Gated = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
    """In full: tensors of all experts of a layer, stacked along a first axis, as some files have them."""
    shared_expert: Gated = (
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
        "mlp.shared_experts.down_proj",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture layers of a model."""

    number: int
    """Routed experts per mixture layer."""
    per_token: int
    """Experts each token is sent to."""
    feed_forward: int
    """Width of one routed expert."""
    shared_feed_forward: int
    """Width of the shared expert that every token passes; 0: none."""
    first_layer: int
    """Layers before this one are dense."""
    groups: int
    """Router groups; 1: no group limit."""
    kept_groups: int
    """Groups a token may choose experts from."""
    scale: float
    """Factor on the routing weights."""
    score: Literal["sigmoid", "softmax"]
    """What makes scores of the router's logits."""
    is_normalised: bool
    """Whether the chosen experts' scores are made to sum to one."""
    has_bias: bool
    """Whether a bias that is no part of the routing weight enters the choice."""

    def __post_init__(self) -> None:
        """Assert what megatron-core's router can do."""
        assert self.score == "softmax" or self.is_normalised, "sigmoid scores are always normalised"
        assert self.score == "sigmoid" or not self.has_bias, "only sigmoid scores take a bias"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(abc.ABC):
    """A decoder of pre-norm blocks with rotary grouped-query attention and gated feed-forward layers."""

    model_type: str
    """`model_type` of config.json, the key of the ARCHITECTURES table."""
    layers: int
    hidden: int
    heads: int
    query_groups: int
    """Key-value heads."""
    head_dim: int
    rotary_dim: int
    """Leading dimensions of each head that are rotated."""
    rotary_base: float
    feed_forward: int
    """Width of dense feed-forward layers."""
    vocabulary: int
    max_positions: int
    tied: bool
    """Whether the output head is the embedding."""
    epsilon: float
    """Of every RMS norm."""
    initializer_range: float
    """Standard deviation of fresh weight matrices."""
    qk_norm: bool = True
    qkv_bias: bool = False
    is_shifted: bool = False
    """Whether the state at a position predicts the token behind it; see `View.shifted`."""
    zero_centered_norms: bool = False
    """Whether every RMS norm multiplies by 1 + weight, so that a fresh weight is 0."""
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    """Factor on token embeddings before the first layer; the output head, tied or not, has none."""
    experts: Experts | None = None
    source: HfConfig = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """The config.json this came from: what we do not read (special ids...) is handed back unchanged."""

    model_types: ClassVar[tuple[str, ...]] = ()
    """All `model_type` words this class reads."""
    names: ClassVar[Names] = Names()
    """What its files call the weights."""
    keys: ClassVar[Mapping[str, str]] = {}
    """The usual key of config.json -> what this family calls it, where the two differ."""
    harmless: ClassVar[Kinds] = {}
    """Keys of config.json that `read` does not ask for and that change nothing, beside every model's."""

    def __post_init__(self) -> None:
        """Refuse shapes that no model can have."""
        if self.heads % self.query_groups:
            raise ConfigError(
                f"config.json: num_attention_heads: {self.heads} is not a multiple of "
                f"num_key_value_heads {self.query_groups}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"config.json: the rotated part of a head ({self.rotary_dim} of {self.head_dim} dimensions) "
                "must be even and not larger than the head; check head_dim and partial_rotary_factor"
            )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Architecture:
        """Read a parsed config.json.

        Raises:
            ConfigError: naming the key that is missing, of the wrong type, not implemented or not known.
        """
        read = ConfigReader(config, cls.keys)
        found = cls.read(read)
        read.refuse_rest(cls.harmless)
        return found

    @classmethod
    @abc.abstractmethod
    def read(cls, read: ConfigReader) -> Architecture:
        """Read a config.json under this family's keys.

        Raises:
            ConfigError: naming the key that is missing, of the wrong type, or not implemented.
        """

    @abc.abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """Return the config.json that `from_hf` reads back to an equal architecture."""

    def has_merged(self, found: Container[str]) -> bool:
        """Say whether a file with tensors of these names stacks all experts of a layer in one tensor."""
        layers = (
            self.names.layer.format(layer=layer) for layer in range(self.layers) if self.is_mixture(layer)
        )
        return any(f"{layer}{name}" in found for layer in layers for name in self.names.merged_experts)

    @property
    def embedding_name(self) -> str:
        """Hugging Face name of the token embedding."""
        return f"{self.names.embedding}.weight"

    @property
    def head_name(self) -> str:
        """Hugging Face name of the output head; where it is tied a folder need not have it."""
        return f"{self.names.head}.weight"

    def ignores(self, name: str) -> bool:
        """Say whether a Hugging Face tensor means nothing: a tied embedding's copy, or a buffer made anew."""
        return (self.tied and name == self.head_name) or bool(_BUFFERS.search(name))

    @property
    def num_experts(self) -> int:
        """Routed experts per mixture layer; 0 for a dense model."""
        return self.experts.number if self.experts else 0

    def common_hf(self) -> dict[str, Any]:
        """Return what every config.json says, under this family's keys."""
        common = {
            "model_type": self.model_type,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.query_groups,
            "head_dim": self.head_dim,
            "intermediate_size": self.feed_forward,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.rotary_base,
            "initializer_range": self.initializer_range,
            "hidden_act": self.activation,
        }
        return {self.keys.get(key, key): value for key, value in common.items()}

    def is_mixture(self, layer: int) -> bool:
        """Say whether a layer (from 0) has experts."""
        return self.experts is not None and layer >= self.experts.first_layer


def body_flops(architecture: Architecture, context: Context, lengths: Sequence[int], rows: int) -> int:
    """Count the floating-point operations of one forward pass from embedded tokens to hidden rows.

    docs/metrics.md defines what counts: matrix products of real tokens only, two operations for a
    multiplication and its addition; attention for the pairs that the mask allows; the experts that a token is
    sent to; the last layer's feed-forward only at the rows that are asked for, because the model makes no
    others. Norms, softmaxes, rotations, activations and embeddings count nothing.

    Args:
        architecture: of the model.
        context: what it reads; every part of the sequence counts.
        lengths: real tokens of each sample, in one part.
        rows: positions that are asked for, of all samples.
    """
    tokens = context.parts * sum(lengths)
    pairs = sum(allowed_pairs(context, length) for length in lengths)
    heads = 2 * architecture.heads + 2 * architecture.query_groups  # of queries and outputs, keys and values
    projections = 2 * tokens * architecture.hidden * architecture.head_dim * heads
    scores_and_sums = 4 * pairs * architecture.heads * architecture.head_dim
    last = architecture.layers - 1
    before = sum(_feed_forward_flops(architecture, layer) for layer in range(last))
    feed_forward = tokens * before + rows * _feed_forward_flops(architecture, last)
    return architecture.layers * (projections + scores_and_sums) + feed_forward


def head_flops(architecture: Architecture, rows: int) -> int:
    """Count the floating-point operations of the logits of some rows over the whole vocabulary, once."""
    return 2 * rows * architecture.hidden * architecture.vocabulary


def _feed_forward_flops(architecture: Architecture, layer: int) -> int:
    """Count, for one token, a layer's gate, up and down products, or those of router and experts."""
    experts, width = architecture.experts, architecture.hidden
    if experts is None or not architecture.is_mixture(layer):
        return 6 * width * architecture.feed_forward
    chosen = experts.per_token * experts.feed_forward + experts.shared_feed_forward
    return 2 * width * experts.number + 6 * width * chosen
