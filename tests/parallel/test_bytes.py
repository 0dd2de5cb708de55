"""What travels in a step: counted on the real collectives, by formula, and in the log."""

import json

import pytest

from bench.exchange_bytes import SMALL, Shapes, measure
from tests.tiny_run import PAIR_ON_FOUR, write_pair_run
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import choose_device
from tide_megatron.base.stop import StopFlag
from tide_megatron.parallel.collectives import Traffic
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import set_up
from tide_megatron.train.step import train_step

WORDS = [*PAIR_ON_FOUR, "steps=2"]


def measured(shapes):
    return measure(shapes, device=choose_device("cpu"), stop=StopFlag())


def test_every_kind_is_the_formulas(pool):
    for found in pool(4).run(measured, SMALL):
        assert found["counted"] == found["formula"]
        assert min(found["counted"].values()) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_at_the_papers_shapes_a_ninth_of_the_logits_travels(pool):
    """A tenth would be the rows' gradients in bf16, which would round shares that cancel."""
    for found in pool(4).run(measured, Shapes(), timeout_seconds=800):
        assert found["counted"] == found["formula"]
        assert sum(found["counted"].values()) <= found["logits"] / 9


def step_and_run(file, folder):
    """Return the bytes of a first step by kind, and what a run of the same recipe wrote into its log."""
    recipe, tree = load_recipe(file, [f"folder={folder}/run", *WORDS])
    parts = set_up(recipe, choose_device("cpu"))
    with Traffic() as traffic:
        result = train_step(parts.run, parts.run.read(parts.loader.update(0)), Clock(total_steps=2))
    train(recipe, tree, True, device=choose_device("cpu"), stop=StopFlag())
    return result.bytes, dict(traffic.calls)


def test_the_log_has_what_was_counted(pool, tmp_path):
    file = write_pair_run(tmp_path / "pair")
    answers = pool(4).run(step_and_run, file, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "train")
    for moved, calls in answers:
        assert {kind: first[f"bytes/{kind}"] for kind in moved} == moved
        assert min(moved.values()) > 0
        assert calls["broadcast"] == 2, "one delivery inside the replica for each microbatch"
