"""All of configs/ resolves, fits the ranks and models that it names, and takes the bytes that it says."""

import re
import shlex
from pathlib import Path

import pytest

from bench.predicted_bytes import architecture_of, place, predict
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.units import in_bytes
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.models import check_layout
from tide_megatron.train.resolve import load_recipe

ROOT = Path(__file__).parents[3]
RUNS = sorted((ROOT / "configs/runs").glob("*.yaml"))
LAYOUTS = sorted((ROOT / "configs/layouts").glob("*.yaml"))
PAPER = ["paper_llada2", "paper_wedlm", "paper_pair"]
OPEN = ["epochs=null", "steps=1"]
"""For recipes whose steps depend on data that is not here."""


def comments(file):
    """Return a file's comments, commands that go on in the next line joined."""
    lines = re.findall(r"^# ?(.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))


def commands(file, start):
    """Return (overrides, ranks) of each command of a start in a file's comments; brackets hold remarks."""
    found = []
    for line in re.findall(rf"{start}(.*)$", comments(file), re.MULTILINE):
        words = shlex.split(line.partition("(")[0])
        ranks = int(words[words.index("--ranks") + 1]) if "--ranks" in words else 1
        found.append(([word for word in words if "=" in word], ranks))
    return found


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder, of which epochs are counted."""
    folder = tmp_path_factory.mktemp("configs") / "data"
    tokenizer = Tokenizer.load(ROOT / "examples/quickstart/models/student")
    chats = ROOT / "examples/first_run/chats.jsonl"
    return prepare([chats], tokenizer, folder, max_length=512, on_long="truncate").samples, folder


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def require_fit(recipe, world):
    """Hold layouts, batch and vocabularies to the ranks."""
    models, ranks = place(recipe, world)
    recipe.batch.accumulation(world)
    for name, model in models.items():
        assert model.architecture.vocabulary % (model.layout.tensor * ranks) == 0, name


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_every_command_in_a_run_file_is_a_recipe_that_fits_its_ranks(file, data):
    given = commands(file, f"tide train {file.relative_to(ROOT)}")
    assert given or file.stem not in PAPER, "it does not say how it is started"
    samples, folder = data
    for overrides, ranks in given or [([], 1)]:
        words = [*overrides, f"data.train={folder}"]
        recipe, _ = load_recipe(file, words)
        require_fit(recipe, ranks)
        if recipe.epochs:
            assert recipe.steps == -(-recipe.epochs * samples // recipe.batch.samples)


def with_layouts(tmp_path, names, run="paper_pair"):
    """Return the recipe of a run file that includes other layouts."""
    text = (ROOT / f"configs/runs/{run}.yaml").read_text(encoding="utf-8")
    listed = ", ".join(str(ROOT / f"configs/layouts/{name}.yaml") for name in names)
    file = tmp_path / "run.yaml"
    file.write_text(re.sub(r"^include: \[.*?\]", f"include: [{listed}]", text, flags=re.MULTILINE))
    return load_recipe(file, OPEN)[0]


@pytest.mark.parametrize("file", LAYOUTS, ids=lambda file: file.stem)
def test_a_layout_fits_the_ranks_that_it_says_and_no_fewer(file, tmp_path):
    recipe = with_layouts(tmp_path, [file.stem])
    (name,) = [name for name in recipe.teachers if f"  {name}:" in file.read_text(encoding="utf-8")]
    teacher = recipe.teachers[name]
    architecture = architecture_of(teacher.folder)
    said = re.search(r"(\d+) ranks or a multiple", comments(file))
    worlds = [1, 3] if said is None else [int(said[1]), 3 * int(said[1])]
    assert said or "Any number of ranks" in comments(file)
    for world in worlds:
        check_layout(teacher, architecture, world, name)
    if said:
        with pytest.raises(ConfigError, match="layout"):
            check_layout(teacher, architecture, worlds[0] // 2, name)
    ((overrides, ranks),) = commands(file, r"python tools/bench/predicted_bytes\.py configs/runs/\w+\.yaml")
    run = re.search(r"configs/runs/(\w+)\.yaml", comments(file))[1]
    counted = predict(with_layouts(tmp_path, [file.stem], run), ranks).weights[name]
    assert f"{in_bytes(counted)} a rank" in comments(file), in_bytes(counted)
    told = load_recipe(ROOT / f"configs/runs/{run}.yaml", [*OPEN, *overrides])[0]
    assert predict(told, ranks).weights[name] == counted, "its command is for another layout"


@pytest.mark.parametrize("run", PAPER)
def test_the_bytes_that_a_run_file_says_are_those_that_are_counted(run, tmp_path):
    file = ROOT / f"configs/runs/{run}.yaml"
    alone, said = predict(load_recipe(file, OPEN)[0], 8), comments(file)
    for size in (alone.total, alone.gradients, alone.optimizer, alone.slab, *alone.weights.values()):
        assert re.search(rf"\b{size / 1e9:.3g}(.0|0)? GB", said), in_bytes(size)
    if run == "paper_pair":
        for layouts in (["llada2_whole_fp8", "wedlm_whole"], ["llada2_ep8", "wedlm_tp2_pp2"]):
            other = predict(with_layouts(tmp_path, layouts), 8)
            assert f" {other.total / 1e9:.3g} GB" in said, layouts


def test_the_paper_s_values_are_in_its_two_pipelines():
    (cross, _), (shared, _) = (load_recipe(ROOT / f"configs/runs/{run}.yaml", OPEN) for run in PAPER[:2])
    files = {run: (ROOT / f"configs/runs/{run}.yaml").read_text(encoding="utf-8") for run in PAPER}
    for recipe, samples in ((cross, 64), (shared, 80)):
        assert (recipe.optimizer.learning_rate, recipe.optimizer.warmup) == (5e-5, 0.1)
        assert (recipe.optimizer.weight_decay, recipe.optimizer.clip_norm) == (0.0, 1.0)
        assert (recipe.seed, recipe.batch.samples, recipe.data.fixed_length) == (42, samples, 512)
        assert recipe.student.context.block_size == 32
        assert recipe.batch.accumulation(8) == (samples // 8, 1)
    assert all("\nepochs: 10 " in text for text in files.values())
    assert (cross.terms["llada"].temperature, cross.teachers["llada"].view) == (5.0, "plain")
    tidal = shared.terms["wedlm"]
    assert (tidal.temperature, tidal.axes, tidal.growth, tidal.timestep_weight) == (
        2.0,
        "both",
        "cosine",
        "midrange",
    )
    assert (tidal.initial, tidal.maximum, tidal.shared_vocab_size) == (0.1, 0.9, 151_646)
    assert shared.teachers["wedlm"].view == "complementary"
    pair, _ = load_recipe(ROOT / "configs/runs/paper_pair.yaml", OPEN)
    assert pair.terms["wedlm_tidal"] == tidal
    assert pair.terms["llada_reverse_calm"] == cross.terms["llada"]
