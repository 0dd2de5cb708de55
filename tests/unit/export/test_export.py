"""A student goes out in three forms, is read back by their readers, and never takes a wrong place."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.tiny_run import recipe_tree, student_config, teacher_config, write_model
from tests.unit.models.conftest import groups  # noqa: F401 - the fixture
from tests.unit.models.shapes import CPU
from tide_megatron.base import disk
from tide_megatron.base.errors import CheckpointError, ConfigError, DataError, TideError
from tide_megatron.base.stop import StopFlag
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import trained_context, write_context
from tide_megatron.export import checks, export
from tide_megatron.export.checks import MOST_TOKENS, probe_ids
from tide_megatron.export.export import ExportOptions, export_student
from tide_megatron.export.formats import FORMATS
from tide_megatron.models.weights import read_architecture
from tide_megatron.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("groups")
TRAINED = Context(kind="block_diffusion", block_size=8)
ALL = ExportOptions(formats=tuple(FORMATS))


@pytest.fixture
def student(tmp_path):
    folder = write_model(tmp_path / "student", student_config(320), seed=1)
    write_context(folder, TRAINED)
    return folder


def go(path, out, choices=ALL, stop=None):
    return export_student(path, out, choices, device=CPU, stop=stop or StopFlag())


def alone(name, **options):
    return ExportOptions(formats=(name,), **options)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_all_forms_are_written_and_verified(student, tmp_path):
    found = go(student, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FORMATS)
    told = [(check.form, check.what) for check in found]
    each = ["tensors", "logits", "contract", "tokenizer"]
    assert [what for name, what in told if name == "a2d-qwen3"] == each
    assert [what for name, what in told if name == "sdar"] == [*each[:3], "servers", each[3]]
    assert [what for name, what in told if name == "qwen3"] == ["tensors", "logits", *each[1:]]
    assert [check.what for check in found if not check.is_fine] == ["servers"], "its mask is not 151669"
    source = load_file(student / "model.safetensors")
    for name in FORMATS:
        folder = tmp_path / "out" / name
        weights = load_file(folder / "model.safetensors")
        head = {"lm_head.weight": source["model.embed_tokens.weight"]} if name == "sdar" else {}
        assert weights.keys() == {*source, *head}
        assert all(torch.equal(weights[key], tensor) for key, tensor in {**source, **head}.items())
        assert trained_context(folder) == TRAINED
        assert Tokenizer.load(folder).digest == Tokenizer.load(student).digest
        config = config_of(folder)
        assert config["architectures"] == [FORMATS[name].architecture]
        assert config["model_type"] == FORMATS[name].model_type
        assert config["tie_word_embeddings"] is (name != "sdar")
        assert config["torch_dtype"] == "float32"
        generation = json.loads((folder / "generation_config.json").read_text())
        ids = Tokenizer.load(student)
        for told in (config, generation):
            assert (told["eos_token_id"], told["pad_token_id"]) == (ids.eos_id, ids.pad_id)
    served = config_of(tmp_path / "out" / "sdar")
    assert (served["block_size"], served["mask_token_id"]) == (8, ids.mask_id)
    assert yaml.safe_load((tmp_path / "out/sdar/sglang_dllm.yaml").read_text()) == {
        "block_size": 8,
        "threshold": 0.95,
    }
    assert not (tmp_path / "out/qwen3/sglang_dllm.yaml").exists()


def test_transformers_finds_the_shipped_configuration_as_servers_do(student, tmp_path):
    go(student, tmp_path / "out", alone("sdar", verify=False))
    code = (
        "import sys, transformers\n"
        "read = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(read.model_type, read.block_size, read.mask_token_id, read.architectures, read.head_dim)"
    )
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        env={**os.environ, **home},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    mask_id = Tokenizer.load(student).mask_id
    assert done.stdout.splitlines()[-1] == f"sdar 8 {mask_id} ['SDARForCausalLM'] 16"


def test_shards_and_dtypes(student, tmp_path):
    found = go(student, tmp_path / "out", alone("a2d-qwen3", dtype="bf16", shard_bytes=10_000))
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {name: load_file(out / file)[name] for name, file in index.items()}
    source = load_file(student / "model.safetensors")
    assert len(set(index.values())) > 2
    assert weights.keys() == source.keys()
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in source.items())
    assert config_of(out)["torch_dtype"] == "bfloat16"
    (logits,) = [check.found for check in found if check.what == "logits"]
    assert logits.endswith("(weights were rounded)")
    go(out, tmp_path / "wide", alone("qwen3", dtype="fp32"))
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(wide[name], tensor.bfloat16().float()) for name, tensor in source.items())


def test_an_untied_student_keeps_its_head(tmp_path):
    config = student_config(320) | {"tie_word_embeddings": False, "model_type": "qwen3"}
    student = write_model(tmp_path / "student", config, seed=1)
    write_context(student, TRAINED)
    go(student, tmp_path / "out")
    head = load_file(student / "model.safetensors")["lm_head.weight"]
    for name in FORMATS:
        written = load_file(tmp_path / "out" / name / "model.safetensors")
        assert torch.equal(written["lm_head.weight"], head)
        assert config_of(tmp_path / "out" / name)["tie_word_embeddings"] is False


def test_exports_are_students_again(student, tmp_path):
    go(student, tmp_path / "out")
    go(tmp_path / "out" / "sdar", tmp_path / "again", alone("sdar"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out/sdar", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_architecture(tmp_path / "again") == read_architecture(tmp_path / "out" / "sdar")


def make_run(student, folder, **changes):
    """Make a run's folder around a student, as training leaves it."""
    folder.mkdir()
    shutil.copytree(student, folder / "model")
    tree = recipe_tree(folder.parent) | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    result = {
        "nll_per_byte": 1.25,
        "clock": {"step": 4},
        "by_time": [[0.5, 1.0]],
        "context": "block_diffusion",
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_runs_story_is_on_the_card(student, tmp_path, inside):
    run = make_run(student, tmp_path / "run")
    go(run / inside, tmp_path / "out", alone("sdar", verify=False))
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["diffusion-language-model", "distillation", "tide", "sdar"]
    recipe = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == yaml.safe_load((run / "recipe.yaml").read_text())
    assert "| `nll_per_byte` | 1.25 |" in card
    assert "| `clock.step` | 4 |" in card
    assert "train (`train`): no longer at hand" in card
    assert "--dllm-block-length 8 --dllm-unmasking-strategy" in card
    assert "they cannot serve it" in card
    for title in ("What it is", "How it was trained", "Data", "Held-out metrics", "How to load it", "Limits"):
        assert f"\n## {title}\n" in card


def test_the_card_of_a_mere_folder_says_what_is_not_known(student, tmp_path):
    (student / "tide_context.json").unlink()
    go(student, tmp_path / "out", alone("qwen3"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No run is known" in card
    assert "context that it was trained in is not recorded" in card
    assert "`generate()` runs, and writes nonsense" in card


def test_a_recipe_says_the_context_where_the_folder_does_not(student, tmp_path):
    (student / "tide_context.json").unlink()
    run = make_run(student, tmp_path / "run")
    go(run, tmp_path / "out", alone("sdar", verify=False))
    assert trained_context(tmp_path / "out") == TRAINED


def refused(path, out, choices=ALL, error=ConfigError):
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(error) as caught:
        go(path, out, choices)
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    assert not list(out.parent.glob(f".{out.name}.*")), "nothing half written stays"
    return str(caught.value)


def test_students_that_cannot_go_out(student, tmp_path):
    mixture = write_model(tmp_path / "mixture", teacher_config(320, 4), seed=1)
    out = tmp_path / "out"
    told = refused(mixture, out, alone("qwen3"))
    assert "model_type: 'llada2_moe' cannot become qwen3" in told
    assert "export a student of model_type a2d-qwen3" in told
    for qk_norm, bias in ((False, False), (True, True)):
        switches = {"model_type": "wedlm", "qk_norm": qk_norm, "attention_bias": bias}
        other = write_model(tmp_path / f"other{bias}", student_config(320) | switches, seed=1)
        assert "'wedlm' cannot become" in refused(other, out)
    small = write_model(tmp_path / "small", student_config(40), seed=1)
    assert "its tokenizer has 312 ids" in refused(small, out)
    write_context(student, Context(kind="bidirectional"))
    assert "this student was trained bidirectional" in refused(student, out, alone("sdar"))
    (student / "tide_context.json").unlink()
    assert "does not say its context" in refused(student, out, alone("sdar"))


def test_folders_that_are_not_whole(student, tmp_path):
    out, run = tmp_path / "out", make_run(student, tmp_path / "run")
    shutil.rmtree(run / "model")
    assert "go on with it by tide train" in refused(run, out, error=CheckpointError)
    weights = load_file(student / "model.safetensors")
    save_file({**weights, "more": torch.ones(1)}, student / "model.safetensors")
    assert "1 unknown: more" in refused(student, out, error=CheckpointError)
    save_file(dict(list(weights.items())[1:]), student / "model.safetensors")
    assert "1 missing: model." in refused(student, out, error=CheckpointError)
    (student / "tokenizer.json").unlink()
    assert f"copy it into {student}" in refused(student, out, error=DataError)


def test_only_an_export_is_replaced_and_only_when_told(student, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    go(student, out, alone("qwen3", verify=False))  # an empty folder may be taken
    assert "or --force to replace it" in refused(student, out, alone("a2d-qwen3"))
    go(student, out, alone("a2d-qwen3", force=True, verify=False))
    assert config_of(out)["model_type"] == "a2d-qwen3"
    go(student, out, ExportOptions(formats=tuple(FORMATS), force=True, verify=False))
    go(student, out, ExportOptions(formats=tuple(FORMATS), force=True, verify=False))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "is no export" in refused(student, tmp_path / "mine", alone("qwen3", force=True))
    (tmp_path / "file").write_text("")
    assert "is no export" in refused(student, tmp_path / "file", alone("qwen3", force=True))
    assert "holds the student itself" in refused(student, student, alone("qwen3", force=True))
    assert "holds the student itself" in refused(student, tmp_path, alone("qwen3", force=True))


def test_a_full_disk_is_seen_before_anything_is_written(student, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_100_000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda place: usage)
    told = refused(student, tmp_path / "out", error=CheckpointError)
    assert "needs 100 MB, the disk has 100 MB; make room" in told


def test_a_disk_that_fills_up_keeps_the_old_export(student, tmp_path, monkeypatch):
    out = tmp_path / "out"
    go(student, out, alone("qwen3", verify=False))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tensors", fail)
    told = refused(student, out, alone("qwen3", force=True), CheckpointError)
    assert "No space left on device" in told


@pytest.mark.parametrize("verify", [True, False])
def test_a_stop_leaves_nothing(student, tmp_path, verify):
    stop = StopFlag()
    stop.request("SIGINT")
    with pytest.raises(TideError, match="stopped by SIGINT"):
        go(student, tmp_path / "out", ExportOptions(formats=("qwen3",), verify=verify), stop=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def spoil(folder: Path, what: str) -> None:
    if what == "weights":
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 0x80
        file.write_bytes(data)
    elif what == "config":
        config = config_of(folder)
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    elif what == "architecture":
        config = config_of(folder)
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    elif what == "tokenizer":
        file = folder / "tokenizer_config.json"
        file.write_text(file.read_text().replace("im_start|>{{", "im_start|> {{"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("weights", "came back different"),
        ("config", "logits by our reader"),
        ("architecture", "architectures is read as ['Other']"),
        ("tokenizer", "the tokenizer came back different"),
    ],
)
def test_verification_refuses_what_reads_back_different(student, tmp_path, monkeypatch, what, said):
    verify = export._verify

    def spoilt(folder, *others):
        spoil(folder, what)
        return verify(folder, *others)

    monkeypatch.setattr(export, "_verify", spoilt)
    assert said in refused(student, tmp_path / "out", alone("a2d-qwen3"), CheckpointError)


def test_the_compared_text_has_hidden_tokens(student):
    tokenizer = Tokenizer.load(student)
    ids = probe_ids(tokenizer)
    assert ids.shape == (1, MOST_TOKENS)
    assert ((ids == tokenizer.mask_id) == (torch.arange(MOST_TOKENS) % 3 == 0)).all()


def test_logits_of_transformers_are_judged(student, tmp_path, monkeypatch):
    real = checks.transformers_logits
    monkeypatch.setattr(export, "transformers_logits", lambda folder, ids: real(folder, ids) + 1e-3)
    told = refused(student, tmp_path / "out", alone("qwen3"), CheckpointError)
    assert "logits by transformers" in told
    monkeypatch.setattr(export, "transformers_logits", lambda folder, ids: real(folder, ids) * float("nan"))
    refused(student, tmp_path / "out", alone("qwen3"), CheckpointError)


def test_a_stock_qwen3_mask_is_what_servers_assume(student, tmp_path, monkeypatch):
    mask_id = Tokenizer.load(student).mask_id
    served = dataclasses.replace(FORMATS["sdar"], mask_id=mask_id)
    monkeypatch.setitem(FORMATS, "sdar", served)
    found = go(student, tmp_path / "out", alone("sdar"))
    assert [check.found for check in found if check.what == "servers"] == [
        f"mask {mask_id}, blocks of 8: as SGLang and LMDeploy have it"
    ]
