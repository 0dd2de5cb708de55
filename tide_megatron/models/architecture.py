"""What a model is, read from a Hugging Face `config.json`: shape facts, and how its weights are named.

An `Architecture` knows numbers and names only: no process group, no device, no megatron. `build.py` makes a
GPTModel of it, `convert.py` moves weights by its table, the planner will ask it for sizes. A new architecture
is one file with a subclass (how to read its config, its `Names`) and one line in `models/__init__.py`.

A config switch that would change the mathematics and is not implemented is refused by name, never ignored.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Container, Mapping
from typing import Any, ClassVar, Literal

from tide_megatron.base.errors import ConfigError
from tide_megatron.models.names import Gated, Names
from tide_megatron.models.reader import HfConfig
from tide_megatron.models.weights import (
    EXPERT,
    LAYER,
    Copy,
    Embedding,
    FusedQkv,
    GatedPair,
    Head,
    Heads,
    Piece,
    Qkv,
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
        """Hold what megatron-core's router can do."""
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
    experts: Experts | None = None
    source: HfConfig = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """The config.json this came from: what we do not read (special ids...) is handed back unchanged."""

    model_types: ClassVar[tuple[str, ...]] = ()
    """All `model_type` words this class reads."""
    names: ClassVar[Names] = Names()
    """What its files call the weights."""
    keys: ClassVar[Mapping[str, str]] = {}
    """The usual key of config.json -> what this family calls it, where the two differ."""

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
    @abc.abstractmethod
    def from_hf(cls, config: HfConfig) -> Architecture:
        """Read a parsed config.json.

        Raises:
            ConfigError: naming the key that is missing, of the wrong type, or not implemented.
        """

    @abc.abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """Return the config.json that `from_hf` reads back to an equal architecture."""

    def pieces(self, *, merged: bool = False) -> list[Piece]:
        """List every weight of the whole model: our name, its Hugging Face names and shapes, how they map.

        Args:
            merged: as a file has them that stacks all experts of a layer in one tensor.
        """
        names, table, norm = self.names, (self.vocabulary, self.hidden), (self.hidden,)
        found: list[Piece] = [
            Embedding.of("embedding.word_embeddings.weight", self.embedding_name, table, place="first")
        ]
        for layer in range(self.layers):
            ours, theirs = f"decoder.layers.{LAYER}.", names.layer.format(layer=layer)
            outer, inner = (
                f"{theirs}{name}.weight" for name in (names.attention_norm, names.feed_forward_norm)
            )
            inside: list[Piece] = [
                Copy.of(f"{ours}input_layernorm.weight", outer, norm, fill=1.0),
                *_attention_pieces(self, ours, theirs),
                Copy.of(f"{ours}pre_mlp_layernorm.weight", inner, norm, fill=1.0),
                *(
                    _mixture_pieces(self, f"{ours}mlp.", theirs, merged=merged)
                    if self.is_mixture(layer)
                    else _gated_pieces(
                        f"{ours}mlp.", theirs, names.feed_forward, (self.feed_forward, self.hidden)
                    )
                ),
            ]
            found += [dataclasses.replace(piece, layer=layer) for piece in inside]
        final = "decoder.final_layernorm.weight"
        found.append(Copy.of(final, f"{names.final_norm}.weight", norm, fill=1.0, place="last"))
        if not self.tied:
            found.append(Head.of("output_layer.weight", f"{names.head}.weight", table))
        return found

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
    def ignored(self) -> frozenset[str]:
        """Hugging Face tensors a folder may contain without meaning: the copy of a tied embedding."""
        return frozenset({f"{self.names.head}.weight"}) if self.tied else frozenset()

    @property
    def head_shape(self) -> Heads:
        """How rows of query, key and value matrices are grouped into heads."""
        return Heads(heads=self.heads, groups=self.query_groups, head_dim=self.head_dim)

    @property
    def num_experts(self) -> int:
        """Routed experts per mixture layer; 0 for a dense model."""
        return self.experts.number if self.experts else 0

    def common_hf(self) -> dict[str, Any]:
        """Return what every config.json says, under this family's keys."""
        facts = {
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
            "hidden_act": "silu",
        }
        return {self.keys.get(key, key): value for key, value in facts.items()}

    def is_mixture(self, layer: int) -> bool:
        """Say whether a layer (from 0) has experts."""
        return self.experts is not None and layer >= self.experts.first_layer


def _attention_pieces(architecture: Architecture, ours: str, theirs: str) -> list[Piece]:
    """List the weights of one attention layer; both prefixes are the layer's."""
    names, shape, width = architecture.names, architecture.head_shape, architecture.hidden
    target = f"{ours}self_attention."
    found: list[Piece] = []
    for kind in ("weight", "bias") if architecture.qkv_bias else ("weight",):
        tail = (width,) if kind == "weight" else ()
        fill = None if kind == "weight" else 0.0
        name = f"{target}linear_qkv.{kind}"
        if len(names.qkv) == 1:
            source = {f"{theirs}{names.qkv[0]}.{kind}": (sum(shape.rows), *tail)}
            found.append(FusedQkv(target=name, sources=source, fill=fill, shape=shape))
        else:
            parts = zip(names.qkv, shape.rows, strict=True)
            sources = {f"{theirs}{part}.{kind}": (rows, *tail) for part, rows in parts}
            found.append(Qkv(target=name, sources=sources, fill=fill, shape=shape))
    out = {f"{theirs}{names.attention_out}.weight": (width, shape.query_rows)}
    found.append(Copy(target=f"{target}linear_proj.weight", sources=out, axis=1))
    if architecture.qk_norm:
        for part, norm in (("q", names.query_norm), ("k", names.key_norm)):
            name = f"{target}{part}_layernorm.weight"
            found.append(Copy.of(name, f"{theirs}{norm}.weight", (architecture.head_dim,), fill=1.0))
    return found


def _mixture_pieces(architecture: Architecture, ours: str, theirs: str, *, merged: bool) -> list[Piece]:
    """List the weights of one mixture layer: router, experts, shared expert; see `Architecture.pieces`."""
    names, experts, width = architecture.names, architecture.experts, architecture.hidden
    assert experts is not None, "the layer is a mixture"
    router = (experts.number, width)
    found: list[Piece] = [Copy.of(f"{ours}router.weight", f"{theirs}{names.router}.weight", router)]
    if experts.has_bias:
        target, source = f"{ours}router.expert_bias", f"{theirs}{names.router_bias}"
        found.append(Copy.of(target, source, router[:1], fill=0.0, is_parameter=False))
    inner = f"{ours}experts.local_experts.{EXPERT}."
    shape = (experts.feed_forward, width)
    for expert in range(experts.number):
        if merged:
            pieces = _gated_pieces(inner, theirs, names.merged_experts, shape, suffix="")
            stack = experts.number
        else:
            gate, up, down = (name.format(expert=expert) for name in names.expert)
            pieces, stack = _gated_pieces(inner, theirs, (gate, up, down), shape), 0
        found += [dataclasses.replace(piece, expert=expert, stack=stack) for piece in pieces]
    if experts.shared_feed_forward:
        shape = (experts.shared_feed_forward, width)
        found += _gated_pieces(f"{ours}shared_experts.", theirs, names.shared_expert, shape)
    return found


def _gated_pieces(
    ours: str, theirs: str, names: Gated, shape: tuple[int, int], suffix: str = ".weight"
) -> list[Piece]:
    """List the two weights of a gated feed-forward block; `linear_fc1` holds the gate, then the up rows.

    Args:
        ours: our prefix of the block.
        theirs: Hugging Face prefix of the layer.
        names: of gate, up and down behind it.
        shape: (width of the block, hidden size).
        suffix: ends the Hugging Face names.
    """
    gate, up, down = (f"{theirs}{name}{suffix}" for name in names)
    return [
        GatedPair(target=f"{ours}linear_fc1.weight", sources={gate: shape, up: shape}),
        Copy(target=f"{ours}linear_fc2.weight", sources={down: shape[::-1]}, axis=1),
    ]
