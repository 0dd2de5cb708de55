"""The public functions: README's ten lines do what they say, importing is instant, docstrings say all."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tide_megatron import api
from tide_megatron.base.errors import ConfigError, TideError

ROOT = Path(__file__).parents[2]
PUBLIC = [getattr(api, name) for name in api.__all__]


def run(words, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.mark.timeout(840)  # a busy machine takes minutes to import torch
def test_the_ten_lines_of_the_readme(tmp_path):
    """As they stand there, from the root of a clone: two ranks, two teachers, the shipped models."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.splitlines()) <= 10
    (tmp_path / "first.py").write_text(block, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    printed = run(["first.py"], tmp_path).stdout
    result = json.loads((tmp_path / "runs/first/result.json").read_text())
    _, score, reply = printed.partition(f"\n{result['nll_per_byte']}\n")
    assert result["finished"]
    assert [teacher["name"] for teacher in result["teachers"]] == ["moe", "dense"]
    assert score
    assert reply.strip()
    config = json.loads((tmp_path / "runs/first-export/config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def test_importing_is_instant(tmp_path):
    code = "import sys; from tide_megatron import api; print({'torch', 'pydantic'} & set(sys.modules))"
    assert run(["-c", code], tmp_path).stdout == "set()\n"


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_docstrings_name_every_argument_what_comes_back_and_what_is_raised(function):
    text = inspect.getdoc(function)
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    assert re.findall(r"^    (\w+): ", arguments, re.MULTILINE) == list(
        inspect.signature(function).parameters
    )
    assert "Raises:" in text.partition("Returns:")[2]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: api.export("runs/x", "out", formats=["sdra"]), "--format: 'sdra' is unknown.*'sdar'"),
        (lambda: api.export("runs/x", "out", shard_size="big"), "--shard-size: 'big' is no size"),
        (
            lambda: api.sample("models/x", ["hello"], context="block_causal"),
            "give --context and --block-size",
        ),
        (
            lambda: api.evaluate("m", "d", times=[0.3, 2]),
            "--times: 2 is not valid: .*less than or equal to 1",
        ),
        (lambda: api.evaluate("m", "d", samples=0), "--samples: 0 is not valid"),
        (lambda: api.evaluate("m", "d"), "give --context and --block-size"),
        (lambda: api.evaluate("m"), "give held-out data .* tasks .* or both"),
        (lambda: api.train("no.yaml"), "no.yaml: no such recipe file"),
        (lambda: api.prepare("out", ["x.jsonl"], tokenizer="x,maks=y", max_length=8), "did you mean 'mask'"),
    ],
)
def test_faults_of_the_caller_name_the_option(call, said):
    assert issubclass(ConfigError, TideError)
    with pytest.raises(ConfigError, match=said):
        call()
