"""Norms of a Megatron checkpoint are found by whatever program's names; a mixture of these is refused."""

from pathlib import Path

import tide_megatron.platform

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from tests.unit.models.shapes import DENSE, MIXTURE, architecture
from tide_megatron.base.errors import CheckpointError
from tide_megatron.convert.conversion import ShardedEntry
from tide_megatron.convert.spelling import as_stored, as_written
from tide_megatron.models.params import FUSED, LOCAL, local_params
from tide_megatron.models.shard import Shard

FOUND = Path("checkpoint")
PLAIN = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)


def entries_of(read):
    """Return a model's entries as megatron-core's own layers name them: every norm fused."""
    found, shard = [], Shard(num_layers=read.layers)
    for name, mapping in local_params(read, shard):
        key = name
        for fused, plain in PLAIN:
            key = key.replace(plain, fused)
        place = ShardedTensor.from_rank_offsets(key, torch.empty(mapping.joined_shape, device="meta"))
        found.append(ShardedEntry(name=name, mapping=mapping, entry=place))
    return found


def names_of(read, spelling):
    return [name for name, _ in local_params(read, Shard(num_layers=read.layers), spelling=spelling)]


def keys(entries):
    return [entry.entry.key for entry in entries]


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_every_programs_spelling_is_found(config):
    read = architecture(config)
    ours = entries_of(read)
    te = as_written(ours, read, "te")
    spelled = {name for name in names_of(read, FUSED) if "norm" in name}
    assert {key for key in keys(te) if "norm" in key} == spelled
    assert len(spelled) == 2 * read.layers + 1 + 2 * read.layers * read.qk_norm
    for stored in (keys(ours), keys(te), names_of(read, LOCAL)):
        assert keys(as_stored(ours, read, set(stored), FOUND)) == stored
    assert keys(as_written(ours, read, "local")) == keys(ours)


@pytest.mark.parametrize(
    ("layer", "fused", "plain"),
    [(2, "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"), (1, *PLAIN[0]), (0, *PLAIN[1])],
    ids=["mixture", "attention", "dense"],
)
@pytest.mark.parametrize("is_beside", [True, False], ids=["beside", "instead"])
def test_mixed_spellings_are_refused_in_a_sentence(layer, fused, plain, is_beside):
    read = architecture(MIXTURE)
    ours = entries_of(read)
    names = {*keys(ours), f"decoder.layers.{layer}.{plain}"}
    if not is_beside:
        names.remove(f"decoder.layers.{layer}.{fused}")
    with pytest.raises(
        CheckpointError, match=r"^checkpoint: mixes two spellings of its norms \([^\n]*$"
    ) as told:
        as_stored(ours, read, names, FOUND)
    assert f"decoder.layers.{layer}.{plain}" in str(told.value)


def test_plain_norms_before_dense_products_and_fused_ones_before_mixtures_are_mixed():
    """Each kind agrees with itself, and no program writes the two together."""
    read = architecture(MIXTURE)
    ours = entries_of(read)
    (fused, plain), *_ = [pair for pair in PLAIN if "linear_fc1" in pair[0]]
    mixtures = [f"decoder.layers.{layer}." for layer in range(read.layers) if read.is_mixture(layer)]
    names = {*names_of(read, LOCAL), *(f"{place}{fused}" for place in mixtures)}
    names -= {f"{place}{plain}" for place in mixtures}
    with pytest.raises(CheckpointError, match="mixes two spellings"):
        as_stored(ours, read, names, FOUND)
