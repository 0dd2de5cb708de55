"""config.json of a Hugging Face model folder: the file, and typed access to what it says.

Whatever a model's reader does not ask for is compared with a list of keys that change nothing (`known`), so
that a config that says more than its reader knows is refused instead of half read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.base.read import doubled_key, json_of
from tide_megatron.models.hf.known import Kinds, refuse_unknown
from tide_megatron.models.hf.rotary import ROTARY_KEYS, SHARE, Rotary, read_rotary
from tide_megatron.models.hf.values import WORDS, Value, checked, fits, shown

CONFIG_FILE = "config.json"
HfConfig = Mapping[str, Any]
Activation = Literal["silu", "gelu_pytorch_tanh"]
"""Of a gated feed-forward block; the second is GELU in its tanh form."""
_MOST_LAYERS, _MOST = 10_000, 2**31 - 1  # more is a damaged file, and would take for ever to be refused


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a folder.

    Raises:
        CheckpointError: when it is missing or not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; give a local folder with {CONFIG_FILE} in it")
    return read_json(folder / CONFIG_FILE, "a Hugging Face model folder needs it")


def write_config(folder: Path, config: HfConfig) -> None:
    """Write config.json into a folder."""
    text = json.dumps(dict(config), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder; `purpose` ends the error message.

    Raises:
        CheckpointError: when it is missing or not a JSON object.
    """
    try:
        value = json_of(path, _once)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {purpose}") from None
    except ValueError as fault:
        raise CheckpointError(f"{path}: not readable as JSON ({fault}); {purpose}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a JSON object; {purpose}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its entries; a key that stands twice has no one value."""
    if (twice := doubled_key(pairs)) is not None:
        raise ValueError(f"{twice} stands twice in one object; remove one of them")
    return dict(pairs)


def with_dtype(config: HfConfig, dtype: str) -> dict[str, Any]:
    """Return a config that names the dtype of its weights, under each of the two keys that it has."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, dtype)}


class ConfigReader:
    """Typed access to a parsed config.json; every error names the key, the value and what to do.

    It remembers what was asked for, which is what `refuse_rest` needs.
    """

    def __init__(self, config: HfConfig, keys: Mapping[str, str] | None = None) -> None:
        """Read a config.

        Args:
            config: parsed config.json.
            keys: the usual key -> what this config calls it, where the two differ.
        """
        self.config = config
        self._keys = keys or {}
        self._read: set[str] = set()

    def own(self, key: str) -> str:
        """Return what this config calls a key."""
        return self._keys.get(key, key)

    def value(self, key: str) -> Any:
        """Return a value as it stands; None: missing or null."""
        key = self.own(key)
        self._read.add(key)
        return self.config.get(key)

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """Return a value of the wanted type; a missing (or null) key without default is an error."""
        value = self.value(key)
        if value is None:
            if default is None:
                raise ConfigError(
                    f"config.json: {self.own(key)} is missing; it must be {WORDS[kind]}: download the "
                    "file again, or write what the model has"
                )
            return default
        return checked(value, kind, self.own(key))

    def size(self, key: str, default: int | None = None, most: int = _MOST) -> int:
        """Return a whole number of at least 1 and at most `most`."""
        value = self.get(key, int, default)
        if not 1 <= value <= most:
            bound = f"at least 1 and at most {most}; download the file again"
            raise ConfigError(f"config.json: {self.own(key)}: {shown(value)} must be {bound}")
        return value

    def only(self, key: str, *implemented: Any, why: str) -> None:
        """Refuse any value but the implemented ones; a missing or null key is always fine."""
        value = self.value(key)
        if value is None or any(value == choice and _same_kind(value, choice) for choice in implemented):
            return
        wanted = " or ".join(repr(choice) for choice in implemented) or "null"
        raise ConfigError(
            f"config.json: {self.own(key)}: {shown(value)} is not supported ({why}); only {wanted} is"
        )

    def must(self, key: str, implemented: Any, why: str) -> None:
        """Refuse any value but the one, a missing or null one too: the model's code would mean another."""
        if self.value(key) is None:
            raise ConfigError(
                f"config.json: {self.own(key)} is missing; only {implemented!r} is supported ({why})"
            )
        self.only(key, implemented, why=why)

    def rotary(self) -> Rotary:
        """Return what the config says of rotary positions, wherever it says it."""
        self._read.update(ROTARY_KEYS)
        return read_rotary(self.config)

    def refuse_rest(self, harmless: Kinds) -> None:
        """Refuse what was not asked for and may change what the model computes.

        Args:
            harmless: keys of this family that change nothing.
        """
        twins = {usual: own for usual, own in self._keys.items() if usual not in harmless}
        for usual, own in twins.items():
            value, other = self.config.get(usual), self.config.get(own)
            if usual not in self._read and value is not None and (value != other or value is True):
                raise ConfigError(
                    f"config.json: {usual}: {shown(value)} and {own}: {shown(other)} are the same fact and "
                    "disagree; keep the one that the model was trained with, under the second key"
                )
        refuse_unknown(self.config, self._read | twins.keys(), harmless)

    def common(
        self,
        *,
        head_dim: int | None = None,
        activation: Activation = "silu",
        epsilon: float = 1e-6,
        feed_forward: int | None = None,
        partly_rotated: bool = False,
    ) -> dict[str, Any]:
        """Return the constructor arguments of an `Architecture` that every config.json holds.

        Args:
            head_dim: what an absent `head_dim` means; None: hidden_size / num_attention_heads.
            activation: the only one that this family's models have.
            epsilon: what an absent `rms_norm_eps` means.
            feed_forward: what an absent `intermediate_size` means; None: it must be there.
            partly_rotated: whether this family's models may rotate a part of each head.

        Raises:
            ConfigError: for a missing or ill-typed key, and for the switches that no architecture implements.
        """
        self.only("hidden_act", activation, why="another activation")
        self._refuse_what_is_missing()
        heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        head_dim = self.size("head_dim", head_dim or max(1, hidden // heads))
        rotary = self.rotary()
        return {
            "model_type": self.get("model_type", str),
            "layers": self._layers(),
            "hidden": hidden,
            "heads": heads,
            "query_groups": self.size("num_key_value_heads", heads),
            "head_dim": head_dim,
            "rotary_dim": self._rotary_dim(head_dim, rotary, partly_rotated=partly_rotated),
            "feed_forward": self.size("intermediate_size", feed_forward),
            "vocabulary": self.size("vocab_size"),
            "max_positions": self.size("max_position_embeddings", 32768),
            "tied": self.get("tie_word_embeddings", bool, False),
            "epsilon": self.get("rms_norm_eps", float, epsilon),
            "rotary_base": rotary.base,
            "initializer_range": self.get("initializer_range", float, 0.02),
            "activation": activation,
            "source": dict(self.config),
        }

    def _rotary_dim(self, head_dim: int, rotary: Rotary, *, partly_rotated: bool) -> int:
        """Return how many leading dimensions of a head are rotated."""
        if not partly_rotated and rotary.share not in (None, 1):
            raise ConfigError(
                f"config.json: {SHARE}: {rotary.share:g} is not supported (partly rotated heads); only 1 is"
            )
        if partly_rotated and rotary.share is None:
            raise ConfigError(
                f"config.json: {SHARE} is missing, there and in rope_parameters; write the part of each head "
                "that the model was trained to rotate"
            )
        dim = int(head_dim * (rotary.share or 1))
        self.only("rotary_dim", dim, why=f"head_dim and {SHARE} make it {dim}")
        return dim

    def _layers(self) -> int:
        """Return the number of layers; all of one kind."""
        layers, types = self.size("num_hidden_layers", most=_MOST_LAYERS), self.value("layer_types")
        if types is not None and types != ["full_attention"] * layers:
            raise ConfigError(
                f"config.json: layer_types: {shown(types)} is not supported; only full_attention is, for "
                f"each of the {layers} layers"
            )
        return layers

    def _refuse_what_is_missing(self) -> None:
        """Refuse the switches that no architecture here implements."""
        self.only("use_sliding_window", False, why="a sliding attention window")
        self.only("quantization_config", why="quantised weights; save the model in bf16 or fp32")
        self.only("transformers_weights", why="weights in another file; name it model.safetensors")
        for part in ("attention", "embedding", "output", "hidden", "residual"):
            self.only(f"{part}_dropout", 0.0, why="dropout")


def _same_kind(value: Any, choice: Any) -> bool:
    """Say whether two equal values are so in JSON, too, where 1 is not true and 1.0 is 1."""
    return fits(value, float) if fits(choice, float) else type(value) is type(choice)
