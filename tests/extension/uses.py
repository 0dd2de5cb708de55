"""What each story is for, run in a process of its own where `tide_megatron` is the extended copy.

python -m tests.extension.uses STORY FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def use_architecture(folder):
    """Build from config.json, save under the family's own names, load, and compute the same."""
    import tide_megatron.platform
    from tide_megatron.platform import start_distributed, stop_distributed

    import torch
    from safetensors import safe_open

    from tests.unit.models.shapes import CPU, DENSE, view
    from tide_megatron.models import ARCHITECTURES
    from tide_megatron.models.build import build_model
    from tide_megatron.models.spec import ModelOptions
    from tide_megatron.models.weights import draw_weights, load_model, read_architecture, save_model
    from tide_megatron.parallel.groups import make_groups
    from tide_megatron.parallel.layout import Layout

    renamed = {"hidden_size": "width", "num_hidden_layers": "depth", "model_type": "model_type"}
    config = {renamed.get(key, key): value for key, value in DENSE.items()} | {"model_type": "made-up"}
    start_distributed(CPU)
    first, second = (
        build_model(ARCHITECTURES["made-up"].from_hf(config), make_groups(Layout()), ModelOptions(device=CPU))
        for _ in range(2)
    )
    draw_weights(first, 1)
    save_model(first, folder)
    assert read_architecture(folder) == first.architecture
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_slice("blocks.1.attention.qkv.weight").get_shape() == [128, 32]
    load_model(second, folder)
    seen = view(config["vocab_size"])
    assert torch.equal(first.rows(seen), second.rows(seen))
    assert first.rows(seen).std() > 0.1
    stop_distributed()


def use_loss(folder):
    """Read it in a recipe, look it up, and hold its own derivative to autograd's of its value."""
    import torch

    from tests.parallel.vocabulary_cases import CASES, CLOCK, counts_of, heads_of, hidden_of, noised_of
    from tests.unit.head.calls import evaluate
    from tide_megatron.head.inputs import HeadInput
    from tide_megatron.losses.rows import rows_of
    from tide_megatron.train.reference import explain
    from tide_megatron.train.resolve import build_recipe

    assert "losses.TERM.temperature (kind: squared)" in explain("losses.TERM")
    context = {"kind": "bidirectional"}
    term = {"kind": "squared", "teacher": "same", "weight": 1.5, "shared_vocab_size": 180}
    recipe, tree = build_recipe(
        {
            "folder": "run",
            "steps": 1,
            "student": {"folder": "student", "context": context},
            "teachers": {"same": {"folder": "teacher", "context": context}},
            "data": {"train": "data"},
            "losses": {"own": term},
        }
    )
    assert tree["losses"]["own"]["kind"] == "squared"
    losses, case = recipe.terms, CASES["three vocabularies"]
    noised = noised_of(case, 1, 2)
    heads, hidden, found = heads_of(case), hidden_of(case, noised, 1), {}
    for form in ("plain", "fused"):
        weight = heads["student"].clone().requires_grad_(form == "plain")
        student = HeadInput(
            hidden=hidden["student"].clone().requires_grad_(),
            weight=weight,
            gradient=None if form == "plain" else torch.zeros_like(weight),
        )
        teachers = {"same": HeadInput(hidden=hidden["same"], weight=heads["same"])}
        counts = counts_of(losses, [noised])
        result = evaluate(student, teachers, losses, rows_of(noised), counts, CLOCK, form=form)
        result.objective.backward()
        gradient = weight.grad if form == "plain" else student.gradient
        found[form] = [result.objective.detach(), student.hidden.grad, gradient]
    assert all(float(tensor.abs().max()) > 1e-3 for tensor in found["plain"])
    for plain, fused in zip(found["plain"], found["fused"], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def use_tokenizer(folder):
    """Load a folder of the new kind, encode a chat, count bytes, save and load again."""
    from tests.small_tokenizer import CHATML
    from tide_megatron.text.chat import encode_chat
    from tide_megatron.text.tokenizer import Tokenizer

    (folder / "ids.bytewise").write_text("<|im_start|>\n<|im_end|>", encoding="utf-8")
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.load(folder, add_mask=True)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocabulary_size) == (258, 257, 259)
    encoded = encode_chat(tokenizer, CHAT, aligned=True)
    assert encoded.reply_bytes == len("wörld".encode())
    text = tokenizer.decode(encoded.ids, keep_special=True)
    assert text.startswith("<|im_start|>user\nhello<|im_end|>\n")
    assert encoded.ends[-1] == len(text.encode())
    tokenizer.save(folder / "again")
    assert Tokenizer.load(folder / "again").digest == tokenizer.digest


def use_chat_template(folder):
    """Name it for a tokenizer that has another."""
    from tests.small_tokenizer import write_tokenizer
    from tide_megatron.text.chat import encode_chat
    from tide_megatron.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(write_tokenizer(folder), template="lines")
    encoded = encode_chat(tokenizer, CHAT)
    start = encoded.prompt_tokens
    assert tokenizer.decode(encoded.ids[:start], keep_special=True) == "user: hello<|im_end|>\nassistant: "
    assert tokenizer.decode(encoded.ids[start:]).strip() == "wörld"


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "wörld"}]
USES = {
    "architecture": use_architecture,
    "loss": use_loss,
    "tokenizer": use_tokenizer,
    "chat template": use_chat_template,
}

if __name__ == "__main__":
    import tide_megatron

    print(tide_megatron.__file__)
    USES[sys.argv[1]](Path(sys.argv[2]))
