"""Conversions: there and back bit for bit, and megatron-core's own models read and write the same files.

The stock models are megatron-core's GPTModel with its own layers, cut over tensor, pipeline or expert ranks;
nothing of ours is in them but the configuration.
"""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import tide_megatron.platform

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from safetensors.torch import load_file

from tests.tiny_run import write_folder
from tests.unit.models.shapes import CPU, DENSE, MIXTURE, architecture
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.stop import StopFlag
from tide_megatron.checkpoint.stored import StoredTensors
from tide_megatron.convert import hf_to_megatron as inward_module
from tide_megatron.convert.hf_to_megatron import hf_to_megatron
from tide_megatron.convert.megatron_to_hf import Written, megatron_to_hf
from tide_megatron.models.params import param_mappings
from tide_megatron.models.spec import ModelOptions, transformer_config
from tide_megatron.parallel.collectives import barrier
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

CONFIGS = {"tied": DENSE, "untied": {**DENSE, "tie_word_embeddings": False}, "mixture": MIXTURE}
SMALL_FILES = 20_000


def write_source(folder, name, dtype=torch.bfloat16, seed=0):
    """Write a model of random weights as a Hugging Face folder; a router bias is fp32, as in real ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        source: torch.randn(shape, generator=generator).to(dtype if piece.is_parameter else torch.float32)
        for piece in param_mappings(architecture(CONFIGS[name]))
        for source, shape in piece.sources.items()
    }
    write_folder(folder, CONFIGS[name], tensors)
    return tensors


def inward(source, target, force=False, dtype=None, layers="local"):
    return hf_to_megatron(source, target, dtype, force, layers, device=CPU, stop=StopFlag())


def outward(source, target, **written):
    return megatron_to_hf(source, target, None, Written(**written), device=CPU, stop=StopFlag())


def read(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def through_stock(source, target, config, layout):
    """Load a checkpoint into stock models and save it again."""
    model_facts = architecture(config)
    groups = make_groups(layout)
    facts = transformer_config(model_facts, ModelOptions(device=CPU, layout=layout))
    stage, stages = groups.pp.rank(), groups.pp.size()
    model = GPTModel(
        config=facts,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            facts, use_transformer_engine=False, normalization="RMSNorm", pp_rank=stage
        ),
        vocab_size=-(-model_facts.vocabulary // layout.tensor) * layout.tensor,
        max_sequence_length=64,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        share_embeddings_and_output_weights=model_facts.tied,
        position_embedding_type="none",
        pg_collection=groups,
    )
    state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})}
    loaded = dist_checkpointing.load(state, str(source))
    told = model.load_state_dict(loaded["model"], strict=False)
    assert not [name for name in told.missing_keys if "_extra_state" not in name]
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
    barrier()
    dist_checkpointing.save(
        {"model": model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})}, str(target)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_bit_identical(pool, tmp_path, name):
    tensors = write_source(tmp_path / "hf", name)
    for ranks, back in ((1, 2), (2, 1)):
        (one, *_) = pool(ranks).run(inward, tmp_path / "hf", tmp_path / "megatron", True)
        assert one["elements"] == sum(tensor.numel() for tensor in tensors.values())
        (told, *_) = pool(back).run(outward_small, tmp_path / "megatron", tmp_path / f"again{back}")
        assert told["files"] > 1
        assert_equal(read(tmp_path / f"again{back}"), tensors)
        assert json.loads((tmp_path / f"again{back}" / "config.json").read_text())["hidden_size"] == 32


def outward_small(source, target):
    return outward(source, target, shard_bytes=SMALL_FILES, force=True)


def test_merged_experts_come_back_split(pool, tmp_path):
    split = write_source(tmp_path / "split", "mixture")
    merged = {}
    for piece in param_mappings(architecture(MIXTURE), merged=True):
        for name, shape in piece.stored.items():
            if name in split:
                merged[name] = split[name]
            else:
                numbered = [name.replace("experts.", f"experts.{number}.") for number in range(shape[0])]
                merged[name] = torch.stack([split[f"{expert}.weight"] for expert in numbered])
    write_folder(tmp_path / "merged", MIXTURE, merged)
    assert set(merged) != set(split)
    pool(2).run(inward, tmp_path / "merged", tmp_path / "megatron")
    pool(1).run(outward, tmp_path / "megatron", tmp_path / "again")
    assert_equal(read(tmp_path / "again"), split)


@pytest.mark.parametrize(
    ("name", "ranks", "layout"),
    [
        ("tied", 2, Layout(tensor=2)),
        ("untied", 4, Layout(tensor=2, pipeline=2)),
        ("mixture", 2, Layout(expert=2)),
        ("mixture", 2, Layout(tensor=2)),
    ],
)
def test_stock_models_read_ours_and_we_read_theirs(pool, tmp_path, name, ranks, layout):
    tensors = write_source(tmp_path / "hf", name, torch.float32)
    pool(1).run(inward, tmp_path / "hf", tmp_path / "ours")
    pool(ranks).run(through_stock, tmp_path / "ours" / "release", tmp_path / "theirs", CONFIGS[name], layout)
    (tmp_path / "theirs" / "hf").mkdir()
    (tmp_path / "theirs" / "hf" / "config.json").write_text(json.dumps(CONFIGS[name]))
    pool(1).run(outward, tmp_path / "theirs", tmp_path / "again")
    assert_equal(read(tmp_path / "again"), tensors)


def test_dtype_and_names_of_other_layers_on_the_way(pool, tmp_path):
    tensors = write_source(tmp_path / "hf", "mixture", torch.float32)
    pool(1).run(inward, tmp_path / "hf", tmp_path / "megatron", False, torch.bfloat16, "te")
    names = set(StoredTensors(tmp_path / "megatron" / "release").entries)
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in names
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" not in names
    pool(1).run(outward, tmp_path / "megatron", tmp_path / "again")
    biases = {name for name in tensors if name.endswith("expert_bias")}
    assert biases
    assert_equal(
        read(tmp_path / "again"),
        {name: tensor if name in biases else tensor.bfloat16() for name, tensor in tensors.items()},
    )


def complaint(function, *args):
    """Return what a conversion says to the user."""
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    return str(caught.value)


def test_bad_input_is_told_and_nothing_is_lost(pool, tmp_path):
    tensors = write_source(tmp_path / "hf", "untied")
    pool(1).run(inward, tmp_path / "hf", tmp_path / "megatron")
    assert "--force" in pool(1).run(complaint, inward, tmp_path / "hf", tmp_path / "megatron")[0]
    assert "no Megatron checkpoint" in pool(1).run(complaint, outward, tmp_path / "hf", tmp_path / "x")[0]

    larger = {**CONFIGS["untied"], "num_hidden_layers": 4}
    (tmp_path / "megatron" / "hf" / "config.json").write_text(json.dumps(larger))
    said = pool(2).run(complaint, outward, tmp_path / "megatron", tmp_path / "x")
    assert all(
        "misshapen: decoder.layers.mlp.linear_fc1.layer_norm_weight [2, 32] instead" in s for s in said
    )
    (tmp_path / "megatron" / "hf" / "config.json").write_text(json.dumps(CONFIGS["untied"]))

    shard = max((tmp_path / "megatron" / "release").glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in pool(1).run(complaint, outward, tmp_path / "megatron", tmp_path / "x")[0]
    assert not (tmp_path / "x").exists()
    shard.write_bytes(whole)
    pool(1).run(outward, tmp_path / "megatron", tmp_path / "x")
    assert_equal(read(tmp_path / "x"), tensors)


class Intruder:
    """What a pickle could do."""

    def __reduce__(self):
        return os.system, ("true",)


def test_an_index_that_is_a_program_is_refused(pool, tmp_path):
    write_source(tmp_path / "hf", "tied")
    pool(1).run(inward, tmp_path / "hf", tmp_path / "megatron")
    (tmp_path / "megatron" / "release" / ".metadata").write_bytes(pickle.dumps(Intruder()))
    (said,) = pool(1).run(complaint, outward, tmp_path / "megatron", tmp_path / "x")
    assert "posix.system" in said


def run_limited(command, most):
    """Run a command that can write no file beyond a size, as on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return subprocess.run(command, check=False, preexec_fn=limit, capture_output=True, text=True)


def test_a_conversion_that_was_cut_off_goes_on(pool, tmp_path):
    tensors = write_source(tmp_path / "hf", "mixture")
    pool(1).run(inward, tmp_path / "hf", tmp_path / "megatron")
    (whole,) = pool(1).run(outward_small, tmp_path / "megatron", tmp_path / "whole")
    sizes = [file.stat().st_size for file in sorted((tmp_path / "whole").glob("*.safetensors"))]
    most = max(sizes[1:])
    assert sizes[0] < most, "the first file must fit"
    command = [sys.executable, "-m", "tide_megatron.commands", "convert", "megatron-to-hf"]
    command += [tmp_path / "megatron", tmp_path / "again"]
    cut = run_limited([*command, "--shard-gb", str(SMALL_FILES / 1e9)], most - 1)  # as it was once spelled
    assert cut.returncode == 2, cut.stderr
    assert "it goes on" in cut.stderr
    assert not (tmp_path / "again").exists()
    others = write_source(tmp_path / "hf2", "mixture", seed=1)
    pool(1).run(inward, tmp_path / "hf2", tmp_path / "megatron2")
    shutil.copytree(tmp_path / ".again.converting", tmp_path / ".other.converting")
    told = pool(1).run(outward_small, tmp_path / "megatron2", tmp_path / "other")
    assert told[0]["files_kept"] == 0
    assert_equal(read(tmp_path / "other"), others)
    command += ["--shard-size", f"{SMALL_FILES}B"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "of an earlier try" in done.stdout
    assert f"in {whole['files']} files" in done.stdout
    assert_equal(read(tmp_path / "again"), tensors)


def inward_small(source, target):
    """Convert into files of few tensors each."""
    usual = inward_module.FILE_ELEMENTS
    inward_module.FILE_ELEMENTS = 16_000
    try:
        return inward(source, target)
    finally:
        inward_module.FILE_ELEMENTS = usual


def inward_on_a_full_disk(source, target, most):
    """Convert on a disk that takes no larger file than so many bytes from this rank's second file on."""
    usual, stock, made = resource.getrlimit(resource.RLIMIT_FSIZE), inward_module.DigestingWriter, []

    class Filling(stock):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            if len(made) == 3:  # the first writes no file, it plans
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, usual[1]))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    inward_module.DigestingWriter = Filling
    try:
        return complaint(inward_small, source, target)
    finally:
        inward_module.DigestingWriter = stock
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_loses_nothing_and_the_way_in_goes_on(pool, tmp_path, ranks):
    tensors = write_source(tmp_path / "hf", "mixture", torch.float32)
    (whole,) = pool(1).run(inward_small, tmp_path / "hf", tmp_path / "whole")
    least = min(file.stat().st_size for file in (tmp_path / "whole" / "release").glob("*.distcp"))
    said = pool(ranks).run(inward_on_a_full_disk, tmp_path / "hf", tmp_path / "megatron", least - 1)
    assert all("it goes on" in words for words in said)
    assert not (tmp_path / "megatron").exists()
    (told, *_) = pool(3 - ranks).run(inward_small, tmp_path / "hf", tmp_path / "megatron")
    assert 0 < told["files_kept"] < told["files"] == whole["files"]
    assert not list(tmp_path.glob(".*")), "nothing half written stays"
    pool(1).run(outward, tmp_path / "megatron", tmp_path / "again")
    assert_equal(read(tmp_path / "again"), tensors)
