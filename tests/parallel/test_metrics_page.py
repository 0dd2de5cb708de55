"""docs/metrics.md is true: it has every name that a real run writes, and no other."""

import json
import re
from pathlib import Path

import pytest

from tests.tiny_run import PAIR_ON_FOUR, write_pair_run
from tide_megatron.base.device import choose_device
from tide_megatron.base.stop import StopFlag
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
WORDS = [
    *PAIR_ON_FOUR,
    "steps=3",
    "metrics.peak_tflops=0.5",
    "evaluation.every=1",
    "checkpoints.every=1",
    "losses.tidal.kind=tidal",
    "losses.tidal.teacher=moe",
]


def names_of_page(text):
    """Return the names in the first column of the page's tables; TERM is for the user to fill in."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def run(file, folder):
    recipe, tree = load_recipe(file, [f"folder={folder}/run", *WORDS])
    train(recipe, tree, True, device=choose_device("cpu"), stop=StopFlag())


@pytest.fixture(scope="module")
def lines(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pool(4).run(run, write_pair_run(folder / "pair"), folder)
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_the_page_has_every_name_and_no_other(lines):
    terms = {name.removeprefix("loss/") for line in lines for name in line if name.startswith("loss/")}
    assert terms == {"ce", "kl", "reverse", "mixed", "dense", "tidal"}
    told = {
        re.sub(
            r"^(nll_per_byte|masked_accuracy)/0\.\d+$",
            r"\1/LEVEL",
            re.sub(rf"^(loss|items|lambda)/({'|'.join(terms)})$", r"\1/TERM", name),
        )
        for line in lines
        for name in line
    }
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
