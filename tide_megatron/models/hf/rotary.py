"""Rotary positions in config.json: three places that may say the same, and nothing else.

Older files have `rope_theta` and `partial_rotary_factor` at the top and what scales them in `rope_scaling`;
transformers 5 moved all of it into `rope_parameters`, and reads `rope_scaling` instead where both are there.
Here every place is read and all must agree, so it does not matter whose rule a model was trained under.
Left out, and refused by name: every scaled kind, and rotary positions that differ by kind of layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tide_megatron.base.errors import ConfigError
from tide_megatron.models.hf.values import checked, shown

BASE, SHARE = "rope_theta", "partial_rotary_factor"
TABLES = ("rope_scaling", "rope_parameters")
"""In transformers' order: the first that says anything is the one it reads."""
ROTARY_KEYS = (BASE, SHARE, *TABLES)
_KINDS = ("rope_type", "type")  # the second is the older word
_TOP = "the top level"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """What config.json says of rotary positions."""

    base: float
    share: float | None
    """Part of each head that is rotated, in (0, 1]; None: nobody says."""


def read_rotary(config: Mapping[str, Any]) -> Rotary:
    """Read the rotary facts of a parsed config.json.

    Raises:
        ConfigError: a fact that is missing, of another type or not implemented, an entry that nobody here
            knows, or two places that disagree.
    """
    told: dict[str, dict[str, float]] = {BASE: {}, SHARE: {}}
    for key, places in told.items():
        if config.get(key) is not None:
            places[_TOP] = checked(config[key], float, key)
    for table in TABLES:
        _read_table(table, config.get(table), told)
    for key, places in told.items():
        _agree(key, places, config)
    base, share = (next(iter(places.values()), None) for places in told.values())
    if base is None:
        raise ConfigError(
            f"config.json: {BASE} is missing, there and in rope_parameters; write the one that the model was "
            "trained with"
        )
    if base <= 0:
        raise ConfigError(f"config.json: {BASE}: {base:g} must be above 0; download the file again")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(
            f"config.json: {SHARE}: {share:g} is no part of a head; it must be above 0 and at most 1"
        )
    return Rotary(base=base, share=share)


def _read_table(name: str, table: Any, told: dict[str, dict[str, float]]) -> None:
    """Enter what a table says; refuse what it says beyond that."""
    if table is None:
        return
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"config.json: {name}: {shown(table)} is not an object; download the file again, or remove the "
            "key if the model's rotary positions are unscaled"
        )
    for key in _KINDS:
        if table.get(key) not in (None, "default"):
            raise ConfigError(
                f"config.json: {name}.{key}: {shown(table[key])} is not supported (scaled rotary positions); "
                "only 'default' is"
            )
    for key, value in table.items():
        where = f"{name}.{key}"
        if value is None or key in _KINDS:
            continue
        if key in told:
            told[key][name] = checked(value, float, where)
        elif isinstance(value, Mapping):
            raise ConfigError(
                f"config.json: {where}: {shown(value)} is not supported (rotary positions by kind of layer); "
                f"if all layers have the same ones, write its entries directly into {name}"
            )
        else:
            raise ConfigError(
                f"config.json: {where}: {shown(value)} is not supported (more than plain rotary positions); "
                "remove it if the model was trained without"
            )


def _agree(key: str, places: Mapping[str, float], config: Mapping[str, Any]) -> None:
    """Refuse a fact that two places tell differently, or that transformers would not find."""
    if len(set(places.values())) > 1:
        values = ", ".join(f"{value:g} in {place}" for place, value in places.items())
        raise ConfigError(
            f"config.json: {key}: {values}: they disagree; keep the one that the model was trained with"
        )
    scaling, parameters = TABLES
    if config.get(scaling) and [*places] == [parameters]:
        raise ConfigError(
            f"config.json: {key}: {places[parameters]:g} stands only in {parameters}, which transformers "
            f"does not read beside {scaling}: {shown(config[scaling])}; remove {scaling}"
        )
