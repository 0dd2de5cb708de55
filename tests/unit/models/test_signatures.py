"""What our layers ask of megatron-core, and megatron-core of Transformer Engine, is what these take.

Nothing of a GPU is needed: signatures.json was read from the sources of the oldest and newest megatron-core
that we support and of Transformer Engine (`tools/signatures.py`), and is compared with those that are here.
"""

import importlib.machinery
import importlib.metadata
import inspect
import json
from pathlib import Path

import tide_megatron.platform

import megatron.core
import pytest

import signatures
from tests.unit.models.shapes import CPU
from tests.unit.models.test_params import CONFIGS
from tide_megatron.base.device import Device
from tide_megatron.models import spec
from tide_megatron.models.arch import ARCHITECTURES
from tide_megatron.models.engine import Engine
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions, block_spec, transformer_config

TABLE = json.loads(signatures.TABLE.read_text(encoding="utf-8"))
CORES = [release for release in TABLE if release.startswith("megatron-core")]
(ENGINE,) = (release for release in TABLE if release.startswith("transformer_engine"))
HANDS = signatures.WANTED["megatron-core"]["hands"]
TO_OLD_RELEASES = {"ub_split_ag", "ub_split_rs", "ub_atomic_gemm_ag", "ub_atomic_gemm_rs"}
"""What megatron-core hands to Transformer Engine before 1.5 alone."""
CUDA = Device(type="cuda", index=0, backend="nccl", threads=1)


def takes(release, place, names):
    """Say which of some names a recorded function does not take."""
    known = {word.rstrip("=") for word in TABLE[release]["takes"][place].split()}
    return [] if any(word.startswith("**") for word in known) else sorted(set(names) - known)


@pytest.mark.parametrize("release", CORES)
@pytest.mark.parametrize("wrapper", HANDS)
def test_transformer_engine_takes_what_megatron_core_hands_it(release, wrapper):
    handed = set(TABLE[release]["hands"][wrapper].split())
    assert {"params_dtype", "device"} < handed, "nothing was found where it is handed on"
    assert takes(ENGINE, HANDS[wrapper], handed - TO_OLD_RELEASES) == []


@pytest.mark.parametrize("release", CORES)
def test_megatron_core_has_every_option_that_our_models_set(release, monkeypatch):
    asked = set()

    def record(**options):
        asked.update(options)
        return options

    monkeypatch.setattr(spec, "TransformerConfig", record)
    for config in CONFIGS.values():
        for engine in ("local", "te"):
            how = ModelOptions(
                device=CUDA,
                precision=Precision("bf16"),
                engine=Engine(name=engine),
                trainable=True,
                recompute=True,
            )
            transformer_config(ARCHITECTURES[config["model_type"]].from_hf(config), how)
    assert {"moe_permute_fusion", "moe_grouped_gemm", "recompute_granularity"} < asked
    fields = [
        TABLE[release]["has"][place].split()
        for place in TABLE[release]["has"]
        if place.endswith(("TransformerConfig", "ModelParallelConfig"))
    ]
    assert sorted(asked - {name for part in fields for name in part}) == []


@pytest.mark.parametrize("release", CORES)
def test_megatron_core_takes_and_has_what_our_layers_use(release):
    found = TABLE[release]
    place = f"{signatures.SPEC}:get_gpt_decoder_block_spec"
    assert takes(release, place, ["config", "use_transformer_engine", "normalization", "pp_rank"]) == []
    model = "megatron/core/models/gpt/gpt_model.py:GPTModel"
    asked = ["transformer_layer_spec", "post_process", "share_embeddings_and_output_weights", "pg_collection"]
    assert takes(release, f"{model}.__init__", asked) == []
    assert takes(release, f"{model}.sharded_state_dict", ["prefix", "sharded_offsets", "metadata"]) == []
    assert takes(release, f"{signatures.TE}:TENorm.__new__", ["config", "hidden_size", "eps"]) == []
    used = {
        "TransformerLayerSubmodules": {"input_layernorm", "pre_mlp_layernorm", "self_attention", "mlp"},
        "TransformerBlockSubmodules": {"layer_specs", "layer_norm"},
        "SelfAttentionSubmodules": {"core_attention", "q_layernorm", "k_layernorm"},
    }
    for place, fields in found["has"].items():
        assert used.get(place.rpartition(":")[2], set()) <= set(fields.split()), place
    assert "sharded_state_dict_keys_map" in str(found["has"])


def test_the_table_is_what_the_installed_megatron_core_says():
    release = f"megatron-core {importlib.metadata.version('megatron-core')}"
    if release not in TABLE:
        pytest.skip(f"{release} is not recorded")
    folder = Path(inspect.getfile(megatron.core)).parents[2]
    assert signatures.differences(TABLE[release], signatures.signatures(folder, release)) == []


def test_the_table_is_what_the_installed_transformer_engine_says():
    """It may be hidden from imports (`find_transformer_engine`); its sources are there all the same."""
    found = importlib.machinery.PathFinder.find_spec("transformer_engine")
    if found is None or not found.origin:
        pytest.skip("Transformer Engine is not installed")
    release = f"transformer_engine {importlib.metadata.version('transformer-engine')}"
    if release != ENGINE:
        pytest.skip(f"{release} is not recorded")
    folder = Path(found.origin).parents[1]
    assert signatures.differences(TABLE[release], signatures.signatures(folder, release)) == []


def test_a_final_norm_that_would_vanish_is_our_bug(monkeypatch):
    """Transformer Engine's layers have no norm to lend: it is inside the linear behind it."""
    read = ARCHITECTURES["a2d-qwen3"].from_hf(CONFIGS["qwen3"])
    config = transformer_config(read, ModelOptions(device=CPU))
    stock = spec.get_gpt_decoder_block_spec

    def without_norms(*args, **options):
        found = stock(*args, **options)
        found.layer_specs[0].submodules.input_layernorm = spec.IdentityOp
        return found

    monkeypatch.setattr(spec, "get_gpt_decoder_block_spec", without_norms)
    with pytest.raises(AssertionError, match="final norm would silently vanish"):
        block_spec(config, 0)
