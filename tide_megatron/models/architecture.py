"""What a model is, read from a Hugging Face `config.json`: shape facts, and how its weights are named.

An `Architecture` knows numbers and names only: no process group, no device, no megatron. `build.py` makes a
GPTModel of it, `convert.py` moves weights by its table, the planner will ask it for sizes. A new architecture
is one file with a subclass and one line in `models/__init__.py`.

A config switch that would change the mathematics and is not implemented is refused by name, never ignored.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from tide_megatron.base.errors import ConfigError
from tide_megatron.models.weights import (
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

HfConfig = Mapping[str, Any]
Value = TypeVar("Value", int, float, bool, str)


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
    """Factor on the normalised routing weights."""


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
    experts: Experts | None = None
    source: HfConfig = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """The config.json this came from: what we do not read (special ids...) is handed back unchanged."""

    model_types: ClassVar[tuple[str, ...]] = ()
    """All `model_type` words this class reads."""
    embedding_name: ClassVar[str]
    """Hugging Face name of the token embedding."""

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

    @abc.abstractmethod
    def attention_names(self, layer: str) -> Mapping[str, str]:
        """Name the attention weights under a layer's Hugging Face prefix; see `_attention_pieces`."""

    def mlp_pieces(self, layer: int, ours: str, theirs: str) -> list[Piece]:
        """List the feed-forward weights of a layer (from 0) under both prefixes; dense unless overridden."""
        return feed_forward_pieces(ours, theirs, self.hidden, self.feed_forward)

    def pieces(self) -> list[Piece]:
        """List every weight of the whole model: our name, its Hugging Face names and shapes, how they map."""
        table, norm = (self.vocabulary, self.hidden), (self.hidden,)
        found: list[Piece] = [
            Embedding.of("embedding.word_embeddings.weight", self.embedding_name, table, place="first")
        ]
        for layer in range(self.layers):
            ours, theirs = f"decoder.layers.{LAYER}.", f"model.layers.{layer}."
            inner = f"{theirs}post_attention_layernorm.weight"
            inside: list[Piece] = [
                Copy.of(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", norm, fill=1.0),
                *_attention_pieces(self, ours, self.attention_names(theirs)),
                Copy.of(f"{ours}pre_mlp_layernorm.weight", inner, norm, fill=1.0),
                *self.mlp_pieces(layer, f"{ours}mlp.", f"{theirs}mlp."),
            ]
            found += [dataclasses.replace(piece, layer=layer) for piece in inside]
        final = "decoder.final_layernorm.weight"
        found.append(Copy.of(final, "model.norm.weight", norm, fill=1.0, place="last"))
        if not self.tied:
            found.append(Head.of("output_layer.weight", "lm_head.weight", table))
        return found

    @property
    def ignored(self) -> frozenset[str]:
        """Hugging Face tensors a folder may contain without meaning: the copy of a tied embedding."""
        return frozenset({"lm_head.weight"}) if self.tied else frozenset()

    @property
    def head_shape(self) -> Heads:
        """How rows of query, key and value matrices are grouped into heads."""
        return Heads(heads=self.heads, groups=self.query_groups, head_dim=self.head_dim)

    @property
    def num_experts(self) -> int:
        """Routed experts per mixture layer; 0 for a dense model."""
        return self.experts.number if self.experts else 0

    def common_hf(self) -> dict[str, Any]:
        """Return what every config.json says under the same keys."""
        return {
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

    def is_mixture(self, layer: int) -> bool:
        """Say whether a layer (from 0) has experts."""
        return self.experts is not None and layer >= self.experts.first_layer


class Reader:
    """Typed access to a parsed config.json; every complaint names the key, the value and the remedy."""

    def __init__(self, config: HfConfig) -> None:
        self._config = config

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """Return a value of the wanted type; a missing (or null) key without default is an error."""
        value = self._config.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"config.json: {key} is missing; it must be a {kind.__name__}")
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number if kind is float else type(value) is kind
        if not fits:
            raise ConfigError(f"config.json: {key}: {value!r} is not a {kind.__name__}")
        return kind(value)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 1."""
        value = self.get(key, int, default)
        if value < 1:
            raise ConfigError(f"config.json: {key}: {value} must be at least 1")
        return value

    def only(self, key: str, *implemented: Any, why: str) -> None:
        """Refuse any value but the implemented ones; a missing or null key is always fine."""
        value = self._config.get(key)
        if value is not None and value not in implemented:
            wanted = " or ".join(repr(choice) for choice in implemented) or "null"
            raise ConfigError(f"config.json: {key}: {value!r} is not supported ({why}); only {wanted} is")

    def _rotary_base(self) -> float:
        """Return rope_theta, also from the `rope_parameters` of newer transformers."""
        parameters = self._config.get("rope_parameters")
        if isinstance(parameters, Mapping):
            Reader(parameters).only("rope_type", "default", why="scaled rotary positions")
            if "rope_theta" in parameters:
                return Reader(parameters).get("rope_theta", float)
        return self.get("rope_theta", float)

    def common(self, head_dim: int | None = None) -> dict[str, Any]:
        """Return the constructor arguments that every config.json holds under the same keys.

        Args:
            head_dim: what an absent `head_dim` means; None: hidden_size / num_attention_heads.

        Raises:
            ConfigError: for a missing or ill-typed key, and for the switches that no architecture implements.
        """
        self._refuse_what_is_missing()
        heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        return {
            "model_type": self.get("model_type", str),
            "layers": self.size("num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "query_groups": self.size("num_key_value_heads", heads),
            "head_dim": self.size("head_dim", head_dim or max(1, hidden // heads)),
            "feed_forward": self.size("intermediate_size"),
            "vocabulary": self.size("vocab_size"),
            "max_positions": self.size("max_position_embeddings", 32768),
            "tied": self.get("tie_word_embeddings", bool, False),
            "epsilon": self.get("rms_norm_eps", float, 1e-6),
            "rotary_base": self._rotary_base(),
            "initializer_range": self.get("initializer_range", float, 0.02),
            "source": dict(self._config),
        }

    def _refuse_what_is_missing(self) -> None:
        """Refuse the switches that no architecture here implements."""
        self.only("hidden_act", "silu", why="another activation")
        self.only("rope_scaling", why="scaled rotary positions")
        self.only("use_sliding_window", False, why="a sliding attention window")
        for key in ("attention_dropout", "embedding_dropout", "output_dropout", "hidden_dropout"):
            self.only(key, 0.0, why="dropout")
        types = self._config.get("layer_types")
        if types is not None and set(types) != {"full_attention"}:
            raise ConfigError(
                f"config.json: layer_types: {sorted(set(types))} is not supported; only full_attention is"
            )


def _attention_pieces(architecture: Architecture, ours: str, theirs: Mapping[str, str]) -> list[Piece]:
    """List the weights of one attention layer.

    Args:
        architecture: for shapes and switches.
        ours: our name of the layer, with its final dot.
        theirs: Hugging Face prefixes of `q`, `k`, `v` (or one fused `qkv`), `out`, `q_norm`, `k_norm`.
    """
    shape, width = architecture.head_shape, architecture.hidden
    rows = {"q": shape.query_rows, "k": shape.key_rows, "v": shape.key_rows}
    target = f"{ours}self_attention."
    found: list[Piece] = []
    for kind in ("weight", "bias") if architecture.qkv_bias else ("weight",):
        tail = (width,) if kind == "weight" else ()
        fill = None if kind == "weight" else 0.0
        name = f"{target}linear_qkv.{kind}"
        if "qkv" in theirs:
            source = {f"{theirs['qkv']}.{kind}": (sum(rows.values()), *tail)}
            found.append(FusedQkv(target=name, sources=source, fill=fill, shape=shape))
        else:
            sources = {f"{theirs[part]}.{kind}": (rows[part], *tail) for part in "qkv"}
            found.append(Qkv(target=name, sources=sources, fill=fill, shape=shape))
    out = {f"{theirs['out']}.weight": (width, shape.query_rows)}
    found.append(Copy(target=f"{target}linear_proj.weight", sources=out, axis=1))
    if architecture.qk_norm:
        for part in ("q", "k"):
            norm = f"{theirs[f'{part}_norm']}.weight"
            found.append(
                Copy.of(f"{target}{part}_layernorm.weight", norm, (architecture.head_dim,), fill=1.0)
            )
    return found


def feed_forward_pieces(
    ours: str, theirs: str, hidden: int, width: int, expert: int | None = None
) -> list[Piece]:
    """List the two weights of a gated feed-forward block; `linear_fc1` holds the gate, then the up rows."""
    pair = {f"{theirs}gate_proj.weight": (width, hidden), f"{theirs}up_proj.weight": (width, hidden)}
    down = {f"{theirs}down_proj.weight": (hidden, width)}
    return [
        GatedPair(target=f"{ours}linear_fc1.weight", sources=pair, expert=expert),
        Copy(target=f"{ours}linear_fc2.weight", sources=down, expert=expert, axis=1),
    ]
