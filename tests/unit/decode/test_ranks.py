"""A model folder answers prompts: the whole path from files to text, on one rank."""

import json

import pytest
import torch

from tests.small_tokenizer import write_tokenizer
from tests.unit.train.test_summary import DENSE
from tide_megatron.base.device import choose_device
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.decode import opening, passes
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.ranks import answer_prompts
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import open_model
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models.build import build_model
from tide_megatron.models.lean import lean_rows
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, read_architecture, save_model
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.text.tokenizer import Tokenizer

CONTEXT = Context(kind="block_diffusion", block_size=4)
TEN = Decoding(new_tokens=10)


SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<m>")


def write_model(folder, *, device, stop, special=SPECIAL[:4], **changes):
    """Write a random model whose vocabulary is its tokenizer's."""
    write_tokenizer(folder, special=special)
    rows = Tokenizer.load(folder).vocabulary_size
    (folder / "config.json").write_text(json.dumps({**DENSE, "vocab_size": rows, **changes}))
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    model = build_model(read_architecture(folder), make_groups(Layout()), ModelOptions(device=device))
    draw_weights(model, seed=1)
    save_model(model, folder, files=files)


def write_and_answer(folder, prompts, *, device, stop, **changes):
    write_model(folder, device=device, stop=stop, **changes)
    return [answer_prompts(folder, prompts, TEN, CONTEXT, device=device, stop=stop) for _ in range(2)]


def one_rank(function, *args):
    return run_ranks(function, args, 1, "cpu")


def test_a_folder_answers_prompts_and_does_so_again(tmp_path):
    first, again = one_rank(write_and_answer, tmp_path / "model", ["one", "two"])
    assert len(first) == 2
    assert all("<|mask|>" not in reply.text and reply.ended in ("length", "eos") for reply in first)
    assert first == again


def committed(folder, rows, louder, *, device, stop):
    """Return the ids that a model of so many rows commits, whose rows `louder` are far from zero."""
    write_model(folder, device=device, stop=stop, vocab_size=rows)
    tokenizer, model = Tokenizer.load(folder), open_model(folder, device)
    with torch.no_grad():
        model.head_weight[louder] = 50 * torch.randn(
            len(louder), model.head_weight.shape[1], generator=torch.Generator().manual_seed(1)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_model", lambda *_: model)
        replies = answer_prompts(folder, ["one", "two"], TEN, CONTEXT, device=device, stop=stop)
    return [token for reply in replies for token in reply.ids], tokenizer


@pytest.mark.parametrize("spare", [1, 200])
def test_rows_that_no_token_has_and_the_mask_are_never_committed(tmp_path, spare):
    size = Tokenizer.load(write_tokenizer(tmp_path / "size")).vocabulary_size
    louder = [3, *range(size, size + spare)]
    ids, tokenizer = one_rank(committed, tmp_path / "model", size + spare, louder)
    assert ids
    assert all(tokenizer.has(token) and token != tokenizer.mask_id for token in ids)


NAMED = [
    ({}, None, 3),
    ({}, "<m>", 4),
    ({"config.json": {"mask_token_id": 4}}, None, 4),
    ({"generation_config.json": {"mask_token_id": 4}}, None, 4),
    ({"tokenizer_config.json": {"mask_token": "<m>"}}, None, 4),
    ({"special_tokens_map.json": {"mask_token": "<m>"}}, None, 4),
    ({"tokenizer_config.json": {"mask_token": "<|mask|>"}}, "<|mask|>", 3),
]
"""What files of a folder say, the mask that is asked for, and the token that stands for masked ones."""


def shown(folder, *, device, stop):
    """Return, for each case, which of the two mask tokens a model is first shown."""
    write_model(folder, device=device, stop=stop, special=SPECIAL)
    model, found = open_model(folder, device), []
    kept = {name: (folder / name).read_text() for name in ("config.json", "tokenizer_config.json")}
    for files, mask, _ in NAMED:
        for name in ("generation_config.json", "special_tokens_map.json"):
            (folder / name).unlink(missing_ok=True)
        for name, text in (kept | {name: kept.get(name, "{}") for name in files}).items():
            (folder / name).write_text(json.dumps(json.loads(text) | files.get(name, {})))
        views = []

        def rows(model, view, reading, views=views):
            views.append(view.ids.flatten().tolist())
            return lean_rows(model, view, reading)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "lean_rows", rows)
            patch.setattr(opening, "open_model", lambda *_: model)
            options = Decoding(new_tokens=2, steps=1)
            answer_prompts(folder, ["one"], options, CONTEXT, mask, device=device, stop=stop)
        found.append({3, 4} & set(views[0]))
    return found


def test_a_model_is_shown_the_mask_that_its_folder_names(tmp_path):
    assert one_rank(shown, tmp_path / "model") == [{wanted} for _, _, wanted in NAMED]


@pytest.mark.parametrize("prompt", ["<|mask|>", "fill in: x = <|mask|><|mask|>", "a\n<|mask|>b"])
def test_a_prompt_that_holds_the_mask_token_is_refused_before_weights_are_read(tmp_path, prompt):
    def asked(*, device, stop):
        write_tokenizer(tmp_path)
        answer_prompts(tmp_path, ["fine", prompt], TEN, CONTEXT, device=device, stop=stop)

    with pytest.raises(DataError, match=r"prompt '.*': contains the mask token <\|mask\|>") as caught:
        one_rank(asked)
    assert "\n" not in str(caught.value)


def test_a_stop_begins_no_further_prompt(tmp_path):
    def stopped(*, device, stop):
        write_model(tmp_path / "model", device=device, stop=stop)
        stop.request("SIGINT")
        return answer_prompts(tmp_path / "model", ["one"], TEN, CONTEXT, device=device, stop=stop)

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
        answer_prompts(tmp_path / "model", ["x"], TEN, CONTEXT, device=device, stop=stop)

    with pytest.raises(DataError, match="no chat template"):
        one_rank(no_template)


def test_an_opened_model_is_frozen(tmp_path):
    def opened(*, device, stop):
        write_model(tmp_path / "model", device=device, stop=stop)
        model = open_model(tmp_path / "model", choose_device("cpu"))
        return model.training, any(parameter.requires_grad for parameter in model.parameters())

    assert one_rank(opened) == (False, False)
