"""Replies do not depend on the cache or on batchmates: to the token, in fp32, for every schedule and model."""


import pytest

from tests.unit.decode.small import load_tokenizer, make_decoder, prompts
from tests.unit.models.conftest import groups  # noqa: F401
from tests.unit.models.shapes import DENSE, DREAM, LLADA, LLADA_MOE, MIXTURE, WEDLM
from tide_megatron.decode.options import Decoding

LENGTHS = [5, 17, 8, 30, 1]
SCHEDULES = {
    "one a token": {},
    "few steps": {"steps": 7},
    "confidence": {"schedule": "confidence", "threshold": 0.3},
    "entropy": {"schedule": "entropy", "threshold": 2.0, "steps": 19},
    "drawn": {"temperature": 0.7, "top_p": 0.8, "seed": 3},
    "guided": {"guidance": 0.5, "steps": 10},
    "reference": {"schedule": "reference", "steps": 12},
}
CONFIGS = {
    "dense": DENSE,
    "mixture": MIXTURE,
    "wedlm": WEDLM,
    "dream": DREAM,
    "llada": LLADA,
    "llada-moe": LLADA_MOE,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def options(**changes):
    return Decoding(**{"new_tokens": 21, "batch": 3, **changes})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_cache_and_batchmates_change_nothing(tokenizer, groups, config, schedule):  # noqa: F811
    decoder = make_decoder(tokenizer, CONFIGS[config], groups)
    asked, words = prompts(LENGTHS), SCHEDULES[schedule]
    replies = decoder.decode(asked, options(**words))
    assert replies == decoder.decode(asked, options(cache=False, **words))
    assert len({reply.ids for reply in replies}) == len(asked)
    if schedule != "reference":  # whose batches share their padding
        alone = [decoder.decode([ids], options(**words), numbers=[n])[0] for n, ids in enumerate(asked)]
        assert replies == alone
        assert replies == decoder.decode(asked, options(**words | {"batch": 5}))
