"""Data whose samples have several learnt replies, from chats to trained and scored."""

import json

import pytest
import torch

from tests.tiny_run import write_cross_run
from tide_megatron import api
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader, SideReading
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.data.sources.record import Learn, Reading
from tide_megatron.diffusion.batch import IGNORED
from tide_megatron.diffusion.noise import NoiseOptions, Noiser
from tide_megatron.text.tokenizer import Tokenizer


def lines(first, number):
    """Return chats of two turns; every third leaves its first reply out."""
    for n in range(first, first + number):
        early = {"role": "assistant", "content": f"left {n} add"} | ({"weight": 0} if n % 3 == 0 else {})
        late = {"role": "assistant", "content": f"return {n} right"}
        turns = [{"role": "user", "content": f"what {n}"}, early, {"role": "user", "content": "does"}, late]
        yield json.dumps({"messages": turns}) + "\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Give a cross-tokenizer run whose data learns all replies, and in `last` the same chats' last ones."""
    folder = tmp_path_factory.mktemp("several")
    recipe = write_cross_run(folder)
    student, own = (Tokenizer.load(folder / name) for name in ("student", "own"))
    sides = {"other": SideChoice(tokenizer=own)}
    for name, first, number in (("train", 0, 40), ("held_out", 40, 8)):
        (folder / f"{name}.jsonl").write_text("".join(lines(first, number)))
    options = {"max_length": 128, "sides": sides, "replace": True}
    for name in ("train", "held_out"):
        reading = Reading(learn=Learn.ALL)
        prepare([folder / f"{name}.jsonl"], student, folder / "data" / name, reading=reading, **options)
    bare = [json.loads(line)["messages"] for line in lines(0, 40)]
    for messages in bare:
        messages[1].pop("weight", None)
    (folder / "last.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in bare))
    prepare([folder / "last.jsonl"], student, folder / "last", **options)
    return folder, recipe


def batch_of(data):
    reading = {"own": SideReading(side="other")}
    return Loader(columns=data, samples=8, sides=reading).batch_of(range(40))


def test_batches_learn_all_replies_and_nothing_else_changes(run):
    folder, _ = run
    every, last = PreparedData(folder / "data/train"), PreparedData(folder / "last")
    assert (every.manifest.learn, last.manifest.learn) == ("all", "last")
    both, one = batch_of(every), batch_of(last)
    assert torch.equal(both.ids, one.ids)
    assert torch.equal(both.labels[one.labels != IGNORED], one.labels[one.labels != IGNORED])
    more = ((both.labels != IGNORED) & (one.labels == IGNORED)).sum(dim=1)
    assert [bool(count) for count in more] == [n % 3 != 0 for n in range(40)]
    tokenizer = Tokenizer.load(folder / "student")
    for n in range(40):
        early = both.labels[n][(both.labels[n] != IGNORED) & (one.labels[n] == IGNORED)]
        assert tokenizer.decode(early.tolist(), keep_special=True) == f"left {n} add<|im_end|>\n" * (
            n % 3 != 0
        )
        extra = len(f"left {n} add") * (n % 3 != 0)
        assert int(both.reply_bytes[n]) == int(one.reply_bytes[n]) + extra
    side, few = both.sides["own"], one.sides["own"]
    assert torch.equal(side.ids, few.ids)
    for n in range(40):
        chunks, known = side.spans[side.sample == n].tolist(), few.spans[few.sample == n].tolist()
        assert chunks[len(chunks) - len(known) :] == known
        assert (len(chunks) > len(known)) == (n % 3 != 0)
        places = [place for start, end, _, _ in chunks for place in range(start, end)]
        assert (both.labels[n][places] != IGNORED).all()


def test_noise_falls_on_all_replies_as_it_does_on_one(run):
    folder, _ = run
    both, one = (batch_of(PreparedData(folder / name)) for name in ("data/train", "last"))
    noiser = Noiser(seed=3, options=NoiseOptions())
    many, few = noiser(both), noiser(one)
    assert torch.equal(many.masked & (one.labels != IGNORED), few.masked)
    assert not (many.masked & (both.labels == IGNORED)).any()
    assert (many.masked & (one.labels == IGNORED)).any(), "earlier replies are masked, too"


def test_a_run_learns_from_them_and_is_scored_on_them(run):
    _, recipe = run
    result = api.train(recipe, ["steps=4", "evaluation.at_start=true"])
    assert result["finished"]
    file = recipe.parent / "run/metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    scores = [line["nll_per_byte"] for line in records if line["kind"] == "evaluate"]
    assert scores[-1] < scores[0], "it has learnt"
    assert all(line["updates_skipped"] == 0 for line in records if "updates_skipped" in line)
    scored = api.evaluate(recipe.parent / "run/model", recipe.parent / "last", samples=8, times=(0.5,))
    assert scored["nll_per_byte"] > 0
