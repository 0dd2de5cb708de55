"""Where a recipe meets its data: a folder or a blend, opened for its readers, and not read too often."""

import pytest
import yaml

from tests.tiny_run import recipe_tree, write_cross_run
from tests.unit.train.test_resolve import GONE, changed
from tide_megatron.base.device import choose_device
from tide_megatron.base.errors import ConfigError
from tide_megatron.data.blend import BlendedData
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.resolve import build_recipe, load_recipe
from tide_megatron.train.setup import examine


@pytest.fixture
def tree(tmp_path):
    return recipe_tree(tmp_path)


BLEND = {"code": {"folder": "data/code", "weight": 2.0}, "chat": {"folder": "data/chat", "weight": 1.0}}


def test_a_run_learns_from_a_folder_or_from_a_blend(tree):
    with pytest.raises(ConfigError, match=r"^data\.train: is required, or data\.blend in its place; set one"):
        build_recipe(changed(tree, data__train=GONE))
    with pytest.raises(ConfigError, match=r"^data\.train: give it or data\.blend, not both; set one"):
        build_recipe(changed(tree, data__blend=BLEND))
    recipe, resolved = build_recipe(changed(tree, data__train=GONE, data__blend=BLEND))
    assert recipe.data.folders == {"data.blend.code": "data/code", "data.blend.chat": "data/chat"}
    assert resolved["data"]["blend"]["code"]["weight"] == 2.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": 0}, r"^data\.blend\.code\.weight: 0 is not valid"),
        ({"weigth": 1}, r"^data\.blend\.code\.weigth: unknown key; .*weight"),
        ({"folder": ""}, r"^data\.blend\.code\.folder: '' is not valid"),
    ],
)
def test_a_wrong_source_of_a_blend_is_named(tree, options, said):
    blend = {"code": {"folder": "data/code"} | options}
    with pytest.raises(ConfigError, match=said):
        build_recipe(changed(tree, data__train=GONE, data__blend=blend))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Write a run with two folders: one for both tokenizers, and one for the student's alone."""
    folder = tmp_path_factory.mktemp("blend")
    file = write_cross_run(folder)
    tree = yaml.safe_load(file.read_text())
    tree["data"].pop("train")
    file.write_text(yaml.safe_dump(tree))
    return folder


def examined(run, *words):
    recipe, _ = load_recipe(run / "run.yaml", words)
    return recipe, examine(recipe, choose_device("cpu"), (0, 1))


def blended(run, name, options, folder="train"):
    return f"data.blend.{name}={{folder: {run}/data/{folder}, {options}}}"


def test_a_blend_is_opened_for_student_and_teachers(run):
    words = [blended(run, "few", "samples: 8, epochs: 5"), blended(run, "all", "epochs: 1")]
    recipe, found = examined(run, *words, "epochs=2", "steps=null", "batch.samples=16")
    found.refuse_faults()
    assert recipe.steps == 10  # 2 x (8 x 5 + 40) samples, 16 an update
    loader = found.data["train"]
    assert isinstance(loader.columns, BlendedData)
    assert loader.columns.epochs(160) == {"few": 10.0, "all": 2.0}
    assert set(loader.sides) == {"own"}
    batch = loader.microbatch(0, 0)
    assert len(batch.sample_ids) == 16
    assert (batch.sample_ids < 40).any()
    assert (batch.sample_ids >= 40).any()
    assert len(batch.sides["own"].spans)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["few: weight: 1", "all: epochs: 2"], r"^data\.blend\.all\.weight: few has one"),
        (
            ["few: weight: 1, most_epochs: 0.1"],
            r"^data\.blend\.few\.most_epochs: the run reads 32 samples, 100.0% of them",
        ),
        (["few: source: x"], r"^data\.blend\.few\.source: .* has no source 'x'"),
    ],
)
def test_shares_that_cannot_be_are_told_with_their_key(run, words, said):
    pairs = [word.split(": ", 1) for word in words]
    _, found = examined(run, *(blended(run, *pair) for pair in pairs))
    with pytest.raises(ConfigError, match=said):
        found.refuse_faults()


def test_an_epoch_of_weights_is_refused(run):
    with pytest.raises(ConfigError, match=r"^epochs: the weights of data\.blend do not say how long one is"):
        load_recipe(run / "run.yaml", [blended(run, "all", "weight: 1"), "epochs=2", "steps=null"])


def test_a_source_is_taken_away_by_null(run):
    words = [blended(run, "few", "samples: 8"), blended(run, "all", "epochs: 1"), "data.blend.few=null"]
    assert list(load_recipe(run / "run.yaml", words)[0].data.blend) == ["all"]
    with pytest.raises(ConfigError, match=r"data\.blend\.fwe: null removes it, but it is not there"):
        load_recipe(run / "run.yaml", [*words[:2], "data.blend.fwe=null"])


def test_tokens_of_a_teacher_that_only_some_sources_have_are_asked_for(run):
    plain, student = run / "data/plain", Tokenizer.load(run / "student")
    prepare([run / "train.jsonl"], student, plain, max_length=128)
    words = blended(run, "both", "epochs: 1"), blended(run, "plain", "epochs: 1", "plain")
    _, found = examined(run, *words)
    with pytest.raises(ConfigError, match=r"^data\.blend\.plain: has no tokens of teacher 'own', .*own="):
        found.refuse_faults()
    _, found = examined(run, *words, "teachers.own.sources=[both]")
    found.refuse_faults()
    batch = found.data["train"].microbatch(0, 0)
    assert batch.taught == {"own": tuple(sample < 40 for sample in batch.sample_ids.tolist())}
    assert set(batch.taught["own"]) == {True, False}


def test_a_source_that_nobody_knows_is_named(run):
    _, found = examined(run, blended(run, "both", "epochs: 1"), "teachers.own.sources=[bth]")
    with pytest.raises(ConfigError, match=r"^teachers\.own\.sources: the blend of both has no source 'bth'"):
        found.refuse_faults()
