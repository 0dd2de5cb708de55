"""A model folder answers prompts: the whole path from files to text, on one rank."""

import json

import pytest

from tests.small_tokenizer import write_tokenizer
from tests.unit.train.test_summary import DENSE
from tide_megatron.base.device import choose_device
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.generate import Sampler, answer_prompts
from tide_megatron.evaluate.model_folder import open_model
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models.build import build_model
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, read_architecture, save_model
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.text.tokenizer import Tokenizer

CONTEXT = Context(kind="block_diffusion", block_size=4)
SAMPLER = Sampler(new_tokens=10, steps=10)


def write_model(folder, *, device, stop, **changes):
    """Write a random model whose vocabulary is its tokenizer's."""
    write_tokenizer(folder)
    rows = Tokenizer.load(folder).vocabulary_size
    (folder / "config.json").write_text(json.dumps({**DENSE, "vocab_size": rows, **changes}))
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    model = build_model(read_architecture(folder), make_groups(Layout()), ModelOptions(device=device))
    draw_weights(model, seed=1)
    save_model(model, folder, files=files)


def write_and_answer(folder, prompts, *, device, stop, **changes):
    write_model(folder, device=device, stop=stop, **changes)
    first = answer_prompts(folder, prompts, CONTEXT, SAMPLER, device=device, stop=stop)
    return first, answer_prompts(folder, prompts, CONTEXT, SAMPLER, device=device, stop=stop)


def one_rank(function, *args):
    return run_ranks(function, args, 1, "cpu")


def test_a_folder_answers_prompts_and_does_so_again(tmp_path):
    first, again = one_rank(write_and_answer, tmp_path / "model", ["one", "two"])
    assert len(first) == 2
    assert all(isinstance(reply, str) and "<|mask|>" not in reply for reply in first)
    assert first == again


def test_a_stop_begins_no_further_prompt(tmp_path):
    def stopped(*, device, stop):
        write_model(tmp_path / "model", device=device, stop=stop)
        stop.request("SIGINT")
        return answer_prompts(tmp_path / "model", ["one"], CONTEXT, SAMPLER, device=device, stop=stop)

    assert one_rank(stopped) == []


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    def too_small(*, device, stop):
        write_and_answer(tmp_path / "model", ["x"], device=device, stop=stop, vocab_size=64)

    with pytest.raises(ConfigError, match=r"its tokenizer has \d+ ids, its model 64 rows"):
        one_rank(too_small)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    def no_template(*, device, stop):
        write_model(tmp_path / "model", device=device, stop=stop)
        write_tokenizer(tmp_path / "model", chat_template=None)
        answer_prompts(tmp_path / "model", ["x"], CONTEXT, SAMPLER, device=device, stop=stop)

    with pytest.raises(DataError, match="no chat template"):
        one_rank(no_template)


def test_an_opened_model_is_frozen(tmp_path):
    def opened(*, device, stop):
        write_model(tmp_path / "model", device=device, stop=stop)
        model = open_model(tmp_path / "model", choose_device("cpu"))
        return model.training, any(parameter.requires_grad for parameter in model.parameters())

    assert one_rank(opened) == (False, False)
