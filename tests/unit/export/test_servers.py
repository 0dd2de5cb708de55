"""An SDAR export is what SGLang and LMDeploy load: tensors, sizes, keys and flags as their sources have them.

Neither server runs here. servers.json was read from their published releases by `tools/servers.py`.
"""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
import yaml
from safetensors import safe_open

import servers
from tests.tiny_run import student_config, write_model
from tests.unit.models.conftest import groups  # noqa: F401 - the fixture
from tests.unit.models.shapes import CPU
from tide_megatron.base.stop import StopFlag
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import write_context
from tide_megatron.export.checks import _config_class
from tide_megatron.export.export import ExportOptions, export_student
from tide_megatron.export.formats import FORMATS
from tide_megatron.export.serving import READ_IN, serving_page

TABLE = json.loads(servers.TABLE.read_text(encoding="utf-8"))
RELEASES = {name: f"{name.lower()} {version}" for name, version in READ_IN.items()}
SGLANG, LMDEPLOY = (TABLE[release] for release in RELEASES.values())
each = pytest.mark.parametrize("facts", [SGLANG, LMDEPLOY], ids=list(RELEASES))
BLOCK, BASE = 8, 1e6


@pytest.fixture(scope="module")
def folder(tmp_path_factory, groups):  # noqa: F811 - the fixture
    tmp_path = tmp_path_factory.mktemp("servers")
    config = student_config(320) | {"rope_theta": BASE}
    student = write_model(tmp_path / "student", config, seed=1)
    write_context(student, Context(kind="block_causal", block_size=BLOCK))
    out = tmp_path / "out"
    export_student(student, out, ExportOptions(formats=("sdar",)), device=CPU, stop=StopFlag())
    return out


def written(folder):
    return json.loads((folder / "config.json").read_text())


def read_as_servers_do(folder):
    return _config_class(folder / "configuration_sdar.py").from_dict(written(folder))


def shapes(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def expected_shape(name, arguments, config):
    """Work out a tensor's shape from the arguments that a server sizes it with, over config.json."""
    heads, pairs, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    of_model = {
        "total_num_heads": heads,
        "total_num_kv_heads": pairs,
        "head_dim": width,
        "embed_dim": config["hidden_size"],
        "padding_idx": 0,
    }
    known = {**config, **of_model, "num_heads": heads}
    sizes = eval(  # of a table of ours
        f"[{arguments}]",
        {"__builtins__": {}},
        {**known, "config": SimpleNamespace(**known), "self": SimpleNamespace(**known)},
    )
    part = name.split(".")[-2]
    if part.endswith("norm"):
        return (sizes[0],)
    if part in ("embed_tokens", "lm_head"):
        assert set(sizes[:2]) == {config["vocab_size"], config["hidden_size"]}
        return (config["vocab_size"], config["hidden_size"])
    if part in ("gate_proj", "up_proj"):
        return (sizes[1][part == "up_proj"], sizes[0])
    if part in ("q_proj", "k_proj", "v_proj"):
        assert {heads, pairs, width} <= set(sizes[1:])
        return ((heads if part == "q_proj" else pairs) * width, sizes[0])
    return (sizes[1], sizes[0])


@each
def test_a_server_finds_every_tensor_in_its_size_and_no_other(folder, facts):
    config, found = written(folder), shapes(folder)
    patterns = {name: re.sub(r"\.\d+\.", ".*.", name) for name in found}
    assert set(patterns.values()) == set(facts["tensors"])
    assert len(found) == 3 + (len(facts["tensors"]) - 3) * config["num_hidden_layers"]
    for name, shape in found.items():
        assert shape == expected_shape(name, facts["tensors"][patterns[name]], config), name


@each
def test_a_server_reads_every_key_as_it_was_written_and_falls_back_on_none(folder, facts):
    said, read = written(folder), read_as_servers_do(folder)
    spared = {
        "quantization_config",
        "num_replicate_key_value_heads",
        "bos_token_id",
    }  # rightly left to servers
    keys = {key: instead for place in facts["reads"].values() for key, instead in place.items()}
    assert {"rope_theta", "head_dim", "rms_norm_eps", "tie_word_embeddings"} < keys.keys()
    for key, instead in keys.items():
        assert hasattr(read, key) or (instead != "required" and key in spared), f"{key}: {instead} is taken"
        if key in said and key != "rope_scaling":
            assert getattr(read, key) == said[key], key
    assert read.rope_theta == BASE
    assert read.rope_parameters == {"rope_theta": BASE, "rope_type": "default"}, "LMDeploy takes these"
    assert read.tie_word_embeddings is False
    assert read.architectures == [servers.MODEL]


def test_the_built_in_numbers_are_those_that_an_export_is_checked_against(folder):
    assert SGLANG["assumes"] == {"mask_id": FORMATS["sdar"].mask_id, "block_size": 4}
    assert LMDEPLOY["assumes"]["dllm_mask_token"] == FORMATS["sdar"].mask_id
    options = yaml.safe_load((folder / "sglang_dllm.yaml").read_text())
    assert options.keys() <= SGLANG["algorithm"].keys()
    assert options == {"block_size": BLOCK, "threshold": float(SGLANG["algorithm"]["threshold"])}


def commands_of(page):
    blocks = re.findall(r"```\n(.*?)\n```", page, flags=re.DOTALL)
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


def test_the_commands_have_flags_that_servers_know(folder):
    page = (folder / "SERVING.md").read_text()
    sglang, lmdeploy, request = commands_of(page)
    assert sglang[:3] == ["python", "-m", "sglang.launch_server"]
    assert lmdeploy[:4] == ["lmdeploy", "serve", "api_server", "FOLDER"]
    for command, facts in ((sglang, SGLANG), (lmdeploy, LMDEPLOY)):
        flags = {word for word in command if word.startswith("--")}
        assert flags <= set(facts["flags"].split())
        assert "--trust-remote-code" in flags
    assert sglang[sglang.index("--dllm-algorithm-config") + 1] == "FOLDER/sglang_dllm.yaml"
    assert lmdeploy[lmdeploy.index("--dllm-block-length") + 1] == str(BLOCK)
    assert json.loads(request[-1])["messages"][0]["role"] == "user"
    assert all(f"## {name} ({version})" in page for name, version in READ_IN.items())
    card = (folder / "README.md").read_text()
    assert commands_of(card)[0] == [*sglang, *lmdeploy]


def test_a_page_for_a_student_whose_mask_servers_do_not_know_says_so_first(folder):
    mask = written(folder)["mask_token_id"]
    assert (
        f"**SGLang and LMDeploy assume mask token 151669 for this architecture; this student's is {mask}"
        in ((folder / "SERVING.md").read_text().split("\n\n")[1])
    )
    theirs = SimpleNamespace(tokenizer=SimpleNamespace(mask_id=151669))
    assert "cannot serve it" not in serving_page(FORMATS["sdar"], theirs, BLOCK)


def test_a_newer_release_that_reads_something_else_is_seen(tmp_path, capsys):
    place = tmp_path / "lmdeploy" / "pytorch"
    for folder in ("models", "configurations", "nn"):
        (place / folder).mkdir(parents=True)
    (place / "models" / "sdar.py").write_text(
        "class Layer:\n    def __init__(self, config):\n"
        "        self.qkv_proj = build_qkv_proj(config.hidden_size, num_q_heads=config.heads)\n"
        "class SDARForCausalLM:\n    def __init__(self, config):\n"
        "        self.model = ModuleList([Layer(config) for _ in range(2)])\n"
        "    def load_weights(self):\n"
        "        stacked_params_mapping = [('.qkv_proj', '.q_proj', 'q'), ('.qkv_proj', '.k_proj', 'k')]\n"
    )
    (place / "configurations" / "default.py").write_text("tied = getattr(hf_config, 'tied', True)\n")
    (place / "configurations" / "sdar.py").write_text("cfg.dllm_mask_token = 7\n")
    (place / "nn" / "rotary_embedding.py").write_text(
        "def get_rope_theta(config):\n    return config.rope_theta\n"
        "def build_rotary_embedding_from_config(config):\n    return config.size\n"
    )
    assert servers.main([RELEASES["LMDeploy"], str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "tensors: {'model.*.q_proj.weight': 'config.hidden_size, config.heads'" in told
    assert "'tied': 'True'" in told
    assert "assumes: {'dllm_mask_token': 7}, in the table" in told
    assert servers.facts(tmp_path, "lmdeploy 0")["reads"]["lmdeploy/pytorch/models/sdar.py"] == {
        "heads": "required",
        "hidden_size": "required",
    }
