"""`tide checkpoint`: what it says of a real run's checkpoints, and of broken ones."""

import json
import pickle
import re

import pytest
from typer.testing import CliRunner

from tests.parallel.test_resume import cut_shard, run
from tests.tiny_run import write_tiny_run
from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.inspect import tensor_differences
from tide_megatron.checkpoint.retention import listed
from tide_megatron.checkpoint.stored import StoredTensors
from tide_megatron.commands import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pool):
    """A run on two ranks that was saved after two steps and after four."""
    base = tmp_path_factory.mktemp("command")
    tiny = write_tiny_run(base / "tiny")
    pool(2).run(run, tiny, base / "run", 2, 3, 1, ("checkpoints.every=2",))
    return base / "run"


def spoken(*words):
    result = CliRunner().invoke(app, ["checkpoint", *map(str, words)], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split()), result.exception


def test_inspect_tells_where_a_run_stands_and_what_is_inside(folder):
    code, said, _ = spoken("inspect", folder, "--tensors")
    assert code == 0
    facts = json.loads((listed(folder / "checkpoints")[-1] / "state.json").read_text())
    assert f"step 4 of 8, 0 skipped samples 32 optimizer steps 4 recipe {facts['recipe_digest']}" in said
    assert re.search(r"written by megatron-core \S+ on 2 ranks", said)
    assert "decoder.layers.mlp.linear_fc1.weight 2 x 96 x 32 float32" in said
    assert "optimizer.state.exp_avg.embedding.word_embeddings.weight 320 x 32 float32" in said


def test_verify_passes_a_whole_one_and_names_what_is_broken(folder, tmp_path):
    old, _ = listed(folder / "checkpoints")
    code, said, _ = spoken("verify", old)
    assert (code, "is whole" in said) == (0, True)
    broken = tmp_path / old.name
    broken.mkdir()
    for path in old.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    cut_shard(broken)
    (broken / "state.json").unlink()
    _, _, fault = spoken("verify", broken)
    assert isinstance(fault, CheckpointError), "the command line ends with code 2 at it"
    cut, gone = str(fault).splitlines()[1:3]
    assert re.fullmatch(r"  __\d_0\.distcp has \d+ bytes instead of \d+", cut)
    assert gone == "  state.json is missing"
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*\); see tide checkpoint verify"):
        list(tensor_differences(old, broken))


def test_diff_names_recipe_clock_and_tensors(folder):
    old, new = listed(folder / "checkpoints")
    code, said, _ = spoken("diff", old, new)
    assert code == 0
    assert "clock.step: 2 -> 4" in said
    assert re.search(r"embedding.word_embeddings.weight \S+ \S+", said)
    found = {line.name: line for line in tensor_differences(old, new)}
    name = "optimizer.state.exp_avg_sq.embedding.word_embeddings.weight"
    a, b = StoredTensors(old).read(name), StoredTensors(new).read(name)
    assert found[name].absolute == float((a - b).abs().max()) > 0
    code, said, _ = spoken("diff", folder, folder / "checkpoints")
    assert (code, said) == (0, "all tensors are equal")


def test_diff_of_other_shapes_and_other_tensors_says_so(folder, tmp_path, pool):
    tiny = write_tiny_run(tmp_path / "tiny", vocabulary=328)
    pool(1).run(run, tiny, tmp_path / "run", 1, 0, 1, ("optimizer.name=sgd",))
    pair = [listed(path / "checkpoints")[0] for path in (folder, tmp_path / "run")]
    found = {line.name: line.words for line in tensor_differences(*pair)}
    assert found["embedding.word_embeddings.weight"] == "shapes (320, 32) and (328, 32)"
    assert found["optimizer.state.exp_avg.embedding.word_embeddings.weight"] == "not in the second"


def test_a_folder_without_a_checkpoint_and_a_table_from_elsewhere_are_refused(folder, tmp_path):
    _, _, fault = spoken("inspect", tmp_path)
    assert "no checkpoint there; give a run folder" in str(fault)

    class Trap:
        def __reduce__(self):
            return print, ("ran",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"builtins\.print does not belong there"):
        StoredTensors(tmp_path)
