"""Decoding over ranks equals one rank; all that holds a student, in training or at rest, decodes alike."""

import json

import pytest

from tests.tiny_run import write_tiny_run
from tide_megatron.base.device import choose_device
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.base.stop import StopFlag
from tide_megatron.checkpoint.metadata import STATE
from tide_megatron.checkpoint.retention import listed
from tide_megatron.decode.decoder import Decoder
from tide_megatron.decode.opening import find, open_decoder
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.ranks import answer_prompts
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.options import Arithmetic
from tide_megatron.export.export import ExportOptions, export_student
from tide_megatron.export.formats import FORMATS
from tide_megatron.models.precision import Fp8Options
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.saving import start_or_resume
from tide_megatron.train.setup import set_up

CONTEXT = Context(kind="block_diffusion", block_size=8)
PROMPTS = ["one", "what does this function do", "add left and right", "", "return"]
WAYS = (
    {"new_tokens": 12},
    {"new_tokens": 12, "temperature": 1.0},
    {"new_tokens": 12, "schedule": "reference", "batch": 2},
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


def answer_in_all_ways(folder):
    device, stop = choose_device("cpu"), StopFlag()
    return [
        answer_prompts(folder, PROMPTS, Decoding(**way), CONTEXT, device=device, stop=stop) for way in WAYS
    ]


def test_any_number_of_ranks_gives_the_same_replies(pool, tiny):
    [one] = pool(1).run(answer_in_all_ways, tiny.parent / "student")
    assert pool(2).run(answer_in_all_ways, tiny.parent / "student") == [one] * 2
    assert all(len({reply.ids for reply in replies}) == len(PROMPTS) for replies in one)


def replies_of(decoder):
    asked = [decoder.prompt_ids([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    return decoder.decode(asked, Decoding(new_tokens=12))


def train_and_decode(recipe_file, folder):
    """Train two updates, export, and decode from everything that holds the student, or held it."""
    device, stop = choose_device("cpu"), StopFlag()
    recipe, tree = load_recipe(recipe_file, [f"folder={folder / 'run'}", "steps=2", "checkpoints.every=1"])
    train(recipe, tree, True, device=device, stop=stop)
    first, last = listed(folder / "run" / "checkpoints")
    choices = ExportOptions(formats=tuple(FORMATS), verify=False)
    export_student(folder / "run", folder / "out", choices, device=device, stop=stop)
    places = [folder / "run", folder / "run" / "model", last, *(folder / "out" / name for name in FORMATS)]
    decoded = [replies_of(open_decoder(place, device)) for place in places]
    parts = set_up(recipe, device)
    start_or_resume(recipe, tree, parts)
    student = parts.run.student
    assert student.model.training
    decoded.append(replies_of(Decoder(student.model, find(last).tokenizer, student.context)))
    assert student.model.training
    (folder / "run" / "model" / "config.json").unlink()
    return decoded, replies_of(open_decoder(first, device)), find(folder / "run").place == last


def faults_of(checkpoint):
    """Return what is said of a checkpoint that is wrong in some way."""
    told = []
    device, kept = choose_device("cpu"), (checkpoint / STATE).read_text()

    def note(**asked):
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            open_decoder(checkpoint, device, **asked)
        told.append(str(caught.value))

    note(arithmetic=Arithmetic(fp8=Fp8Options()))
    state = json.loads(kept)
    for change in ({"folder": "/nowhere"}, {"context": {"kind": "none"}}):
        changed = {**state["recipe"], "student": {**state["recipe"]["student"], **change}}
        (checkpoint / STATE).write_text(json.dumps({**state, "recipe": changed}))
        note()
    (checkpoint / STATE).write_text(json.dumps({**state, "recipe": {}}))
    note()
    (checkpoint / STATE).write_text(kept + " ")
    note()
    return told


def test_everything_that_holds_the_student_decodes_alike(pool, tiny, tmp_path):
    [(decoded, earlier, goes_on)] = pool(1).run(train_and_decode, tiny, tmp_path)
    assert all(replies == decoded[0] for replies in decoded)
    assert earlier != decoded[0], "the checkpoint of another step"
    assert goes_on, "a run without a finished model is its newest checkpoint"
    [told] = pool(1).run(faults_of, listed(tmp_path / "run" / "checkpoints")[0])
    for words, said in zip(
        (
            "a checkpoint cannot be read in FP8; export it",
            "student.folder is /nowhere, where no config.json is; put the folder back",
            "context.kind: 'none' is unknown",
            "its recipe says no student; give the run's model/ instead",
            f"is not whole: {STATE} has",
        ),
        told,
        strict=True,
    ):
        assert words in said


def test_a_run_that_has_written_nothing_is_said_to(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match="the run has no model/ yet"):
        find(tmp_path)


def cut_over_two(folder):
    device = choose_device("cpu")
    decoder = open_decoder(folder, device, context=CONTEXT)
    decoder.model.groups.ep = decoder.model.groups.dp
    with pytest.raises(ConfigError, match="this one is cut over several; open its checkpoint"):
        Decoder(decoder.model, decoder.tokenizer, CONTEXT)


def test_a_model_that_is_cut_is_refused(pool, tiny):
    pool(2).run(cut_over_two, tiny.parent / "student")
