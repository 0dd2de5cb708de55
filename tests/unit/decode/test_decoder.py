"""Replies depend on neither cache nor batchmates: to the token, in fp32, for every schedule and model."""

import dataclasses
import logging

import pytest
import torch

from tests.unit.decode.small import BLOCKS, load_tokenizer, make_decoder, prompts
from tests.unit.models.conftest import groups  # noqa: F401 - the fixture
from tests.unit.models.shapes import DENSE, DREAM, LLADA, LLADA_MOE, MIXTURE, WEDLM, build
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.decoder import Decoder
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.passes import Stream
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import View

LENGTHS = [5, 14, 8, 1]
SCHEDULES = {
    "one a token": {},
    "few steps": {"steps": 5},
    "confidence": {"schedule": "confidence", "threshold": 0.3},
    "entropy": {"schedule": "entropy", "threshold": 2.0, "steps": 9},
    "drawn": {"temperature": 0.7, "top_p": 0.8, "seed": 3},
    "guided": {"guidance": 0.5, "steps": 6},
    "reference": {"schedule": "reference", "steps": 8},
}
CONFIGS = {"mixture": MIXTURE, "wedlm": WEDLM, "dream": DREAM, "llada": LLADA, "llada-moe": LLADA_MOE}
WHOLE = Context(kind="bidirectional")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def options(**changes):
    return Decoding(**{"new_tokens": 13, "batch": 3, **changes})


@pytest.mark.parametrize(
    ("config", "schedule"),
    [*((DENSE, word) for word in SCHEDULES), *((config, "entropy") for config in CONFIGS.values())],
    ids=[*(f"dense, {word}" for word in SCHEDULES), *CONFIGS],
)
def test_the_cache_and_batchmates_change_nothing(tokenizer, groups, config, schedule):  # noqa: F811
    decoder = make_decoder(tokenizer, config, groups)
    asked, words = prompts(LENGTHS), SCHEDULES[schedule]
    replies = decoder.decode(asked, options(**words))
    assert replies == decoder.decode(asked, options(cache=False, **words))
    assert len({reply.ids for reply in replies}) == len(asked)
    if schedule != "reference":  # whose batches share their padding
        alone = [decoder.decode([ids], options(**words), numbers=[n])[0] for n, ids in enumerate(asked)]
        assert replies == alone


@pytest.mark.parametrize("config", ["dream", "llada"])
def test_a_bidirectional_model_is_read_whole(tokenizer, groups, caplog, config):  # noqa: F811
    decoder = make_decoder(tokenizer, CONFIGS[config], groups, context=WHOLE)
    asked = prompts(LENGTHS)
    with caplog.at_level(logging.INFO, "tide_megatron"):
        replies = decoder.decode(asked, options(steps=6))
    assert "no prefix can be remembered" in caplog.text
    assert replies == [decoder.decode([ids], options(steps=6))[0] for ids in asked]
    assert {reply.forwards for reply in replies} == {6}


@pytest.mark.parametrize("shift", [False, True])
def test_a_block_is_read_as_training_read_it(tokenizer, groups, monkeypatch, shift):  # noqa: F811
    """The first pass over a block against the noised part of [x_t ; x_0]; a shifted model's first place has
    the clean token before the block there, and not the noised part's."""
    decoder = make_decoder(tokenizer, DENSE, groups, shift=shift)
    [prompt], seen = prompts([19]), []
    hidden = Stream.hidden

    def noted(self, canvases):
        [canvas] = canvases
        seen.append((canvas.start, list(canvas.masked), list(canvas.ids), hidden(self, canvases)))
        return seen[-1][-1]

    monkeypatch.setattr(Stream, "hidden", noted)
    decoder.decode([prompt], options(new_tokens=20, steps=4))
    for start, masked, ids, states in seen:
        end = start + 8
        both, length = torch.tensor(ids[:end]).repeat(2), len(ids[:end])
        # A view is asked for a place and reads the one before it, here of the clean part.
        rows = [slot + length * (shift and slot == start) for slot in masked]
        view = View(
            ids=both[None],
            positions=torch.arange(length).repeat(2)[None],
            context=BLOCKS,
            length=length,
            segments=None,
            rows=torch.tensor(rows),
        )
        with torch.no_grad():
            ours = decoder.model.rows(view)
        torch.testing.assert_close(states, ours, rtol=1e-4, atol=1e-4)
    assert len({start for start, *_ in seen}) == 3


def test_draws_depend_on_seed_number_position_and_step_alone(tokenizer, groups):  # noqa: F811
    decoder = make_decoder(tokenizer, DENSE, groups)
    asked, drawn = prompts([9, 9, 9]), {"temperature": 1.0}
    asked[1] = asked[0]
    first = decoder.decode(asked, options(**drawn))
    assert first[0].ids != first[1].ids, "the same prompt under two numbers"
    assert decoder.decode(asked[2:], options(**drawn), numbers=[2]) == first[2:]
    assert decoder.decode(asked, options(seed=1, **drawn)) != first


def test_the_mask_and_rows_without_a_token_are_never_written(tokenizer, groups):  # noqa: F811
    decoder = make_decoder(tokenizer, DENSE, groups)
    rows = len(decoder.model.head_weight)
    with torch.no_grad():
        decoder.model.head_weight[[tokenizer.mask_id, rows - 1]] *= 50
    words = ({}, {"temperature": 1.0}, {"schedule": "confidence"}, {"schedule": "entropy"})
    for reply in [decoder.decode(prompts([9]), options(**word))[0] for word in words]:
        assert all(tokenizer.has(token) and token != tokenizer.mask_id for token in reply.ids)


def test_a_model_in_training_is_handed_back_as_it_was(tokenizer, groups):  # noqa: F811
    """Decoding between two backward passes changes neither modes nor gradients, in a mixture with a bias."""

    def gradients(*, decodes):
        model = build(MIXTURE, groups, trainable=True, vocab_size=tokenizer.vocabulary_size)
        model.decoder.layers[0].eval()
        ids = torch.arange(32)[None] % 60
        view = View(
            ids=ids,
            positions=torch.arange(16).repeat(2)[None],
            context=BLOCKS,
            length=16,
            segments=None,
            rows=torch.arange(16),
        )
        model.rows(view).square().sum().backward()
        if decodes:
            Decoder(model, tokenizer, BLOCKS).decode(prompts([9]), options(steps=3))
        model.rows(view).square().sum().backward()
        assert [layer.training for layer in model.decoder.layers] == [False, True, True]
        counted = [buffer.clone() for _, buffer in model.named_buffers()]
        return [value.grad.clone() for value in model.parameters() if value.grad is not None], counted

    assert torch.is_grad_enabled()
    for plain, after in zip(gradients(decodes=False), gradients(decodes=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True))


def test_blocks_are_told_as_they_are_finished(tokenizer, groups):  # noqa: F811
    decoder, told = make_decoder(tokenizer, DENSE, groups), []
    replies = decoder.decode(
        prompts([5, 14]), options(), numbers=[7, 9], on_block=lambda *what: told.append(what)
    )
    for number, reply in zip([7, 9], replies, strict=True):
        parts = [part for who, part in told if who == number]
        assert parts[-1] == reply
        assert [part.ended for part in parts] == [None, None, reply.ended][-len(parts) :]
        assert [part.ids for part in parts] == [reply.ids[: len(part.ids)] for part in parts]
        assert [len(part.ids) for part in parts] == [3, 11, 13] if number == 7 else [2, 10, 13]


def test_a_stop_ends_what_was_begun_and_begins_nothing(tokenizer, groups):  # noqa: F811
    decoder, stop = make_decoder(tokenizer, DENSE, groups), StopFlag()
    asked = prompts(LENGTHS)
    replies = decoder.decode(asked, options(batch=2), stop=stop, on_block=lambda *_: stop.request("SIGINT"))
    assert replies == decoder.decode(asked, options())[:2]
    assert decoder.decode(asked, options(), stop=stop) == []


def test_a_reply_ends_where_the_window_does(tokenizer, groups, caplog):  # noqa: F811
    """The first reply ends early, and the last one moves to its row."""
    decoder = make_decoder(tokenizer, DENSE, groups, max_position_embeddings=24)
    asked = prompts([20, 3, 9])
    with caplog.at_level(logging.INFO, "tide_megatron"):
        replies = decoder.decode(asked, options())
    assert [len(reply.ids) for reply in replies] == [4, 13, 13]
    assert "1 of 3 prompts leave fewer than 13 of the model's 24 positions" in caplog.text
    assert replies == [decoder.decode([ids], options())[0] for ids in asked]
    with pytest.raises(DataError, match="prompt 4: has 24 tokens, and the model 24 positions"):
        decoder.decode(prompts([3, 24]), options(), numbers=[3, 4])


def test_no_prompt_no_reply(tokenizer, groups):  # noqa: F811
    assert make_decoder(tokenizer, DENSE, groups).decode([], options()) == []


def test_a_model_with_too_few_rows_is_refused(tokenizer, groups):  # noqa: F811
    with pytest.raises(ConfigError, match=r"its tokenizer has \d+ ids, its model 64 rows"):
        make_decoder(tokenizer, DENSE, groups, vocab_size=64)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"threshold": 0.5}, "threshold: 0.5 has no meaning under schedule=count"),
        ({"schedule": "confidence", "threshold": 1.5}, "threshold: no probability is above 1.5"),
    ],
)
def test_a_threshold_that_means_nothing_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        Decoding(**words)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Decoding)])
def test_values_that_cannot_be_are_refused_by_name(name):
    bad = {"stop": ("",), "cache": "x", "schedule": "x", "seed": 0.5, "threshold": 0.0}.get(name, -1)
    with pytest.raises(ValueError, match=name):
        Decoding(**{name: bad})
