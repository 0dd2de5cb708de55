"""`tide train --dry-run`: what it prints can be run again, and what cannot run is refused with its key."""

import re
import shutil

import pytest
import yaml

from tests.tiny_run import write_tiny_run
from tide_megatron.base.device import Device
from tide_megatron.base.errors import TideError
from tide_megatron.train import summary
from tide_megatron.train.folder import claim_folder
from tide_megatron.train.resolve import build_recipe, digest, load_recipe
from tide_megatron.train.summary import print_summary

DENSE = {
    "model_type": "a2d-qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MIXTURE = {
    **DENSE,
    "model_type": "llada2_moe",
    "partial_rotary_factor": 1.0,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Write a whole run; return its recipe's file."""
    return write_tiny_run(tmp_path_factory.mktemp("dry"))


def look(file, *words, world=1, resume=True):
    print_summary(*load_recipe(file, [*words]), world, resume=resume)


def faults_of(file, *words, **options):
    """Return the first lines of the faults that a dry run finds."""
    with pytest.raises(TideError) as caught:
        look(file, *words, **options)
    lines = str(caught.value).splitlines()
    listed = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    assert not listed or lines[0] == f"{len(listed)} faults:"
    return listed or [str(caught.value)]


def test_what_is_printed_is_the_same_recipe(run, capsys):
    words = ["teachers.moe.layout.expert=2", "batch.microbatch=2", "teachers.moe.fp8.recipe=blockwise"]
    look(run, *words, world=2)
    printed, said = capsys.readouterr()
    _, resolved = load_recipe(run, words)
    assert build_recipe(yaml.safe_load(printed))[1] == resolved
    assert f"digest {digest(resolved)}, 2 rank(s)" in said
    assert "8 samples an update = 2 rank(s) x 2 microbatch(es) x 2" in said
    assert "4 steps read 32 samples: 0.8 epochs of 40" in said
    assert f"{run.parent}/run: the run starts" in said
    assert "no fault was found" in said
    rows = [" ".join(line.split()) for line in said.splitlines()]
    assert "student a2d-qwen3 block_diffusion 8 fp32, local whole; 2 replica(s)" in rows
    assert "moe llada2_moe block_diffusion 8 fp32 and FP8 blockwise, emulated expert 2; 2 replica(s)" in rows
    assert not (run.parent / "run").exists()


@pytest.mark.parametrize(
    ("words", "world", "starts"),
    [
        (["teachers.moe.layout.expert=4"], 2, [r"teachers\.moe\.layout \{expert=4\}: .*\{expert=2\}"]),
        (["teachers.moe.layout.tensor=2"], 1, [r"teachers\.moe\.layout"]),
        ([], 3, [r"batch\.samples: 8 samples per update cannot be shared by 3 ranks"]),
        (["data.fixed_length=9"], 1, [r"data\.fixed_length: 9 is below"] * 2),
        (["data.held_out=gone"], 1, ["gone: no prepared data"]),
        (["head.form=fused", "head.budget_mib=0.001"], 1, [r"head\.budget_mib: "]),
        (["student.folder=gone"], 1, ["gone: no such model folder"]),
        (["student.folder={tmp}/cut"], 1, ["{tmp}/cut/model.safetensors: "]),
        (["teachers.moe.folder={tmp}/cut"], 1, ["{tmp}/cut/model.safetensors: "]),
        (["folder={tmp}/file/run"], 1, ["folder: {tmp}/file/run cannot be used"]),
        (["losses.kl.shared_vocab_size=400"], 1, [r"losses\.kl\."]),
        (
            [
                "student.folder=gone",
                "teachers.moe.folder={tmp}/cut",
                "teachers.moe.layout.expert=2",
                "data.train=nor",
                "data.held_out={tmp}/file",
                "folder={tmp}/file/run",
            ],
            3,
            [
                "gone: no such model folder",
                r"teachers\.moe\.layout \{expert=2\}",
                "{tmp}/cut/model.safetensors: ",
                r"batch\.samples: 8 samples",
                "nor: no prepared data",
                "{tmp}/file",
                "folder: {tmp}/file/run cannot be used",
            ],
        ),
    ],
    ids=str,
)
def test_every_fault_is_found_at_once(run, tmp_path, words, world, starts):
    cut = shutil.copytree(run.parent / "student", tmp_path / "cut")
    (cut / "digests.json").unlink(missing_ok=True)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-7])
    (tmp_path / "file").write_text("")
    found = faults_of(run, *(word.format(tmp=tmp_path) for word in words), world=world)
    assert len(found) == len(starts), found
    for start in starts:
        pattern = start.replace("{tmp}", re.escape(str(tmp_path)))
        assert any(re.match(pattern, line) for line in found), (start, found)


def test_a_run_folder_is_looked_at_and_left_alone(run, tmp_path, capsys):
    _, tree = load_recipe(run, [f"folder={tmp_path}/run"])
    claim_folder(tmp_path / "run", tree, resume=True)
    found = faults_of(run, f"folder={tmp_path}/run", "seed=5")
    assert found[0].startswith(f"folder: {tmp_path}/run holds the run of another recipe:\n  seed: 3 -> 5")
    look(run, f"folder={tmp_path}/run", "seed=5", resume=False)
    assert "the run starts anew; what is there goes" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_bf16_on_a_gpu_that_does_not_have_it_is_refused_with_the_models_key(run, monkeypatch):
    old = Device(type="cuda", index=0, backend="nccl", threads=1, name="Tesla T4", capability=(7, 5))
    monkeypatch.setattr(summary, "choose_device", lambda wanted: old)
    (fault,) = faults_of(run, "device=auto", "head.form=plain", "teachers.moe.precision=bf16")
    assert re.match(r"^teachers\.moe\.precision: 'bf16' needs .*Tesla T4 \(sm_75\); use", fault)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["epochs=1", "steps=null"], 5),
        (["epochs=2.5", "steps=null"], 13),
        (["epochs=0.01", "steps=null"], 1),
        (["epochs=3", "steps=null", "batch.samples=20"], 6),
        (["epochs=0.8"], 4),
        ([], 4),
    ],
    ids=str,
)
def test_epochs_become_steps(run, words, steps):
    recipe, tree = load_recipe(run, words)
    assert (recipe.steps, tree["steps"]) == (steps, steps)
    assert build_recipe(tree) == (recipe, tree)
    same = [word for word in words if "epochs" not in word and "steps" not in word]
    assert digest(tree) == digest(load_recipe(run, [*same, f"steps={steps}"])[1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["epochs=1"], r"steps: 4, but epochs: 1\.0 of 40 samples are 5 steps; give one of the two"),
        (["epochs=0", "steps=null"], "epochs: 0 is not valid"),
        (["epochs=many", "steps=null"], "epochs: 'many' is not valid"),
        (
            ["epochs=1", "steps=null", "data.train=gone"],
            r"epochs: 1\.0 need the training data, or give steps: gone",
        ),
        (["steps=null"], "steps: None is not valid"),
        (["epochs=null", "steps=null"], "steps: None is not valid"),
    ],
    ids=str,
)
def test_epochs_that_cannot_be_steps(run, words, said):
    with pytest.raises(TideError, match=f"^{said}"):
        load_recipe(run, words)
