"""config.json of a Hugging Face model folder: the file, and typed access to what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from tide_megatron.base.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
HfConfig = Mapping[str, Any]
Activation = Literal["silu", "gelu_pytorch_tanh"]
"""Of a gated feed-forward block; the second is GELU in its tanh form."""
Value = TypeVar("Value", int, float, bool, str)


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
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {purpose}") from None
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path}: not readable as JSON ({fault}); {purpose}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a JSON object; {purpose}")
    return value


class ConfigReader:
    """Typed access to a parsed config.json; every error names the key, the value and what to do."""

    def __init__(self, config: HfConfig, keys: Mapping[str, str] | None = None) -> None:
        """Read a config.

        Args:
            config: parsed config.json.
            keys: the usual key -> what this config calls it, where the two differ.
        """
        self._config = config
        self._keys = keys or {}

    def own(self, key: str) -> str:
        """Return what this config calls a key."""
        return self._keys.get(key, key)

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """Return a value of the wanted type; a missing (or null) key without default is an error."""
        key = self.own(key)
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
            raise ConfigError(f"config.json: {self.own(key)}: {value} must be at least 1")
        return value

    def only(self, key: str, *implemented: Any, why: str) -> None:
        """Refuse any value but the implemented ones; a missing or null key is always fine."""
        key = self.own(key)
        value = self._config.get(key)
        if value is not None and value not in implemented:
            wanted = " or ".join(repr(choice) for choice in implemented) or "null"
            raise ConfigError(f"config.json: {key}: {value!r} is not supported ({why}); only {wanted} is")

    def must(self, key: str, implemented: Any, why: str) -> None:
        """Refuse any value but the one, a missing or null one too: the model's code would mean another."""
        key = self.own(key)
        if self._config.get(key) is None:
            raise ConfigError(f"config.json: {key} is missing; only {implemented!r} is supported ({why})")
        self.only(key, implemented, why=why)

    def _rotary_base(self) -> float:
        """Return rope_theta, also from the `rope_parameters` of newer transformers."""
        parameters = self._config.get("rope_parameters")
        if isinstance(parameters, Mapping):
            ConfigReader(parameters).only("rope_type", "default", why="scaled rotary positions")
            if "rope_theta" in parameters:
                return ConfigReader(parameters).get("rope_theta", float)
        return self.get("rope_theta", float)

    def common(self, head_dim: int | None = None, activation: Activation = "silu") -> dict[str, Any]:
        """Return the constructor arguments of an `Architecture` that every config.json holds.

        Args:
            head_dim: what an absent `head_dim` means; None: hidden_size / num_attention_heads.
            activation: the only one that this family's models have.

        Raises:
            ConfigError: for a missing or ill-typed key, and for the switches that no architecture implements.
        """
        self.only("hidden_act", activation, why="another activation")
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
            "activation": activation,
            "source": dict(self._config),
        }

    def _refuse_what_is_missing(self) -> None:
        """Refuse the switches that no architecture here implements."""
        self.only("rope_scaling", why="scaled rotary positions")
        self.only("use_sliding_window", False, why="a sliding attention window")
        for part in ("attention", "embedding", "output", "hidden", "residual"):
            self.only(f"{part}_dropout", 0.0, why="dropout")
        types = self._config.get("layer_types")
        if types is not None and set(types) != {"full_attention"}:
            raise ConfigError(
                f"config.json: layer_types: {sorted(set(types))} is not supported; only full_attention is"
            )
