"""docs/metrics.md is true: it has every name that a real run writes, and no other."""

import json
import re
from pathlib import Path

import pytest

from tests.tiny_run import PAIR_ON_FOUR, write_pair_run
from tide_megatron.base.device import choose_device
from tide_megatron.base.stop import StopFlag
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
WORDS = [
    *PAIR_ON_FOUR,
    "steps=3",
    "metrics.peak_tflops=0.5",
    "evaluation.every=1",
    "evaluation.prompts=[Say hello.]",
    "evaluation.decoding={new_tokens: 4}",
    "evaluation.agreement=4",
    "metrics.gradients_every=2",
    "checkpoints.every=1",
    "losses.tidal.kind=tidal",
    "losses.tidal.teacher=moe",
    "data.train=null",
]


EPOCHS = {"old": 3, "new": 1}
"""Two sources of a blend, and how often they are read."""
TEACHERS = ("moe", "own", "dense")
SOURCES = ("even", "odd")
"""Two sources of the held-out data."""


def write_blended_run(folder):
    """Write the pair run with held-out data of two sources."""
    file = write_pair_run(folder)
    records = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    lines = [json.dumps(record | {"source": SOURCES[at % 2]}) for at, record in enumerate(records)]
    (folder / "held_out.jsonl").write_text("\n".join(lines))
    student, other = (Tokenizer.load(folder / name) for name in ("student", "own"))
    prepare(
        [folder / "held_out.jsonl"],
        student,
        folder / "data/held_out",
        max_length=128,
        sides={"other": SideChoice(tokenizer=other)},
        replace=True,
    )
    return file


def names_of_page(text):
    """Return the names in the first column of the page's tables; TERM is for the user to fill in."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def run(file, folder):
    data = file.parent / "data"
    words = [
        f"data.blend.{name}={{folder: {data}/train, epochs: {epochs}}}" for name, epochs in EPOCHS.items()
    ]
    recipe, tree = load_recipe(file, [f"folder={folder}/run", *WORDS, *words])
    train(recipe, tree, True, device=choose_device("cpu"), stop=StopFlag())


@pytest.fixture(scope="module")
def lines(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pool(4).run(run, write_blended_run(folder / "pair"), folder)
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def _with_placeholder(name, terms):
    patterns = {
        rf"^(loss|items|lambda|gradient_norm|gradient_cosine)/({'|'.join(terms)})$": r"\1/TERM",
        rf"^(teacher_kl|teacher_top1|chunk_kl|pushed_up)/({'|'.join(TEACHERS)})$": r"\1/TEACHER",
        rf"^(nll_per_byte|masked_accuracy|epochs)/({'|'.join([*EPOCHS, *SOURCES])})$": r"\1/SOURCE",
        r"^(nll_per_byte|masked_accuracy)/0\.\d+$": r"\1/LEVEL",
    }
    for pattern, written in patterns.items():
        name = re.sub(pattern, written, name)
    return name


def test_the_page_has_every_name_and_no_other(lines):
    terms = {name.removeprefix("loss/") for line in lines for name in line if name.startswith("loss/")}
    assert terms == {"ce", "kl", "reverse", "mixed", "dense", "tidal"}
    told = {_with_placeholder(name, terms) for line in lines for name in line}
    assert told == names_of_page(PAGE.read_text(encoding="utf-8"))


def test_every_training_record_has_rates_memory_and_utilisation(lines):
    records = [line for line in lines if line["kind"] == "train"]
    assert len(records) == 3
    for line in records:
        assert line["tokens_per_second_per_device"] == pytest.approx(line["tokens_per_second"] / 4)
        assert line["mfu"] == pytest.approx(line["tflops_per_device"] / 0.5)
        assert 0 < line["mfu"] < 1
        assert line["peak_memory_bytes"] > 2**20
        assert sum(value for name, value in line.items() if name.startswith("phase/")) <= 1


def test_every_mixture_tells_its_lambda(lines):
    records = [line for line in lines if line["kind"] == "train"]
    for line in records:
        assert {name for name in line if name.startswith("lambda/")} == {"lambda/tidal", "lambda/mixed"}
    assert [line["lambda/mixed"] for line in records] == pytest.approx([0.1, 0.3, 0.7])


def test_sources_tell_how_often_they_were_read_and_how_they_score(lines):
    trained = [line for line in lines if line["kind"] == "train"]
    for line in trained:  # 40 samples each; the update has 8
        read = [line[f"epochs/{name}"] * 40 for name in EPOCHS]
        assert read == pytest.approx([line["step"] * 6, line["step"] * 2])
    for line in lines:
        if line["kind"] == "evaluate":
            low, high = sorted(line[f"nll_per_byte/{name}"] for name in SOURCES)
            assert low < line["nll_per_byte"] < high


def test_terms_tell_their_gradients_when_they_are_measured(lines):
    records = [line for line in lines if line["kind"] == "train"]
    told = [{name for name in line if name.startswith("gradient_")} for line in records]
    assert told[0] == told[2]
    assert told[1] == set()
    for line in records[::2]:
        assert all(abs(line[f"gradient_cosine/{term}"]) <= 1 for term in ("kl", "reverse", "dense"))
