"""Tokens a second of decoding: the package's decoder against the reference's way of one sampler, in turns.

    python tools/bench/decode.py --json           (about ten minutes of one core)
    python tools/bench/decode.py --model quickstart --batch 1 --rounds 1

Both decode the same prompts on the same model, one token a step, with the reference's padding; the tokens
must be equal. `whole`: no token ends a reply, so each has all its new tokens. `ended`: replies end as a user
sees them (quickstart's student alone; a random model writes no end token); only tokens before the end count,
in both. The reference's way is `plain_decode.py`.

Then the confidence threshold against one token a step, both by the decoder: tokens a forward and a second;
for the quickstart's student which share of the replies' tokens, and of whole replies, is the same, and for
the shipped models of `examples/exercises` the exact match of held-out exercises (`--model exercises`).

Last, what bf16 changes, where equality to the token is not promised (`--model exercises`): how many replies,
and tokens at the same place, stay the same without the cache, alone instead of in a batch, and in fp32.

On a CPU time is in CPU-seconds of one thread, which a busy machine changes least; figures are medians over
rounds, ratios those of neighbours.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tide_megatron.platform

import torch

from bench.plain_decode import decode_plainly
from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.canvas import Canvas, Rules
from tide_megatron.decode.denoise import denoise
from tide_megatron.decode.opening import open_decoder
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.reply import Reply
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import open_model
from tide_megatron.evaluate.options import Arithmetic
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.tasks.exercises import Exercises
from tide_megatron.text.tokenizer import Tokenizer

EXERCISES = Path(__file__).parents[2] / "examples" / "exercises" / "models"
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "models" / "student"
BLOCK = 32
THRESHOLDS = (0.9, 0.7, 0.5)
WIDE: dict[str, Any] = {
    "model_type": "a2d-qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 768,
    "vocab_size": 16_384,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
"""A random model, of Qwen3-0.6B's proportions of layers to vocabulary."""
ASKED = (
    "Return the sum of two numbers.",
    "Return the number of words in a text, where words are separated by any white space.",
    "Read a JSON file and return its content; an empty file gives an empty dictionary.",
    "Return True if the path exists and is a folder that the user may write to, otherwise False. Links count "
    "as what they point to, and a path that cannot be looked at counts as one that does not exist.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    new_tokens: int
    rounds: int
    questions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its prompts."""

    model: TideModel
    prompts: Sequence[Sequence[int]]
    mask_id: int
    pad_id: int
    end_ids: frozenset[int]

    def reference(self, batch: int, new_tokens: int, *, ends: bool) -> list[list[int]]:
        """Decode the reference's way."""
        return decode_plainly(
            self.model,
            self.prompts[:batch],
            new_tokens=new_tokens,
            block=BLOCK,
            mask_id=self.mask_id,
            pad_id=self.pad_id,
            end_ids=self.end_ids if ends else frozenset(),
        )

    def decoder(self, batch: int, options: Decoding, *, ends: bool) -> list[Canvas]:
        """Decode with the package."""
        rules = Rules(
            options=options,
            block=BLOCK,
            mask_id=self.mask_id,
            pad_id=self.pad_id,
            end_ids=self.end_ids if ends else frozenset(),
            stop_ids=frozenset(),
            decode=str,
        )
        prompts = self.prompts[:batch]
        is_padded = options.schedule == "reference"
        length = -(-max(map(len, prompts)) // BLOCK) * BLOCK
        canvases = [
            Canvas(rules, number, prompt, options.new_tokens, (length - len(prompt)) * is_padded)
            for number, prompt in enumerate(prompts)
        ]
        banned = [] if is_padded else [self.mask_id]
        denoise(self.model, Context(kind="block_diffusion", block_size=BLOCK), canvases, options, banned)
        return canvases


def measure(setting: Setting, *, device: Device, stop: StopFlag) -> dict[str, Any]:
    """Measure everything on this rank."""
    found: dict[str, Any] = {"against the reference's way": [], "confidence threshold": []}
    for name in setting.models:
        if name == "exercises":
            for model, batch in itertools.product(("student", "dense"), setting.batches):
                found["exercises"] = found.get("exercises", []) + _exercises(model, batch, setting, device)
            found["bf16"] = [row for model in ("student", "dense") for row in _bf16(model, setting, device)]
            continue
        subject = _subject(name, device)
        for batch, ends in itertools.product(setting.batches, (False, True)):
            if ends and not subject.end_ids:
                continue
            row = {"model": name, "batch": batch, "replies": "ended" if ends else "whole"}
            figures = _against_reference(subject, batch, setting, ends=ends)
            found["against the reference's way"].append({**row, **figures})
        if subject.end_ids:
            for batch, threshold in itertools.product(setting.batches, THRESHOLDS):
                row = {"model": name, "batch": batch, "threshold": threshold}
                figures = _threshold(subject, batch, threshold, setting)
                found["confidence threshold"].append({**row, **figures})
    return found


def _subject(name: str, device: Device) -> Subject:
    """Open the quickstart's student, or draw the wide model, with prompts of 40 to 190 tokens."""
    generator = torch.Generator().manual_seed(0)
    if name == "quickstart":
        tokenizer = Tokenizer.load(QUICKSTART)
        assert tokenizer.chat is not None, "the quickstart's student answers chats"
        texts = [
            tokenizer.chat.render([{"role": "user", "content": text}], add_generation_prompt=True)
            for text in ASKED
        ]
        return Subject(
            model=open_model(QUICKSTART, device),
            prompts=[tokenizer.encode(text) for text in texts] * 4,
            mask_id=tokenizer.mask_id,
            pad_id=tokenizer.pad_id,
            end_ids=frozenset({tokenizer.eos_id}),
        )
    model = build_model(
        ARCHITECTURES[WIDE["model_type"]].from_hf(WIDE), make_groups(Layout()), ModelOptions(device=device)
    )
    draw_weights(model, 1)
    lengths = torch.randint(40, 190, (16,), generator=generator).tolist()
    mask, pad = WIDE["vocab_size"] - 1, WIDE["vocab_size"] - 2
    return Subject(
        model=model,
        prompts=[torch.randint(0, pad, (length,), generator=generator).tolist() for length in lengths],
        mask_id=mask,
        pad_id=pad,
        end_ids=frozenset(),
    )


def _against_reference(subject: Subject, batch: int, setting: Setting, *, ends: bool) -> dict[str, Any]:
    """Time both ways in turns; their tokens must be equal."""
    options = Decoding(schedule="reference", new_tokens=setting.new_tokens, batch=batch)
    spent: dict[str, list[float]] = {"reference": [], "decoder": []}
    tokens = 0
    for _ in range(setting.rounds):
        seconds, plain = _timed(lambda: subject.reference(batch, setting.new_tokens, ends=ends))
        spent["reference"].append(seconds)
        seconds, canvases = _timed(lambda: subject.decoder(batch, options, ends=ends))
        spent["decoder"].append(seconds)
        replies = [list(canvas.reply().ids) for canvas in canvases]
        tokens = sum(map(len, replies))
        wanted = [_cut(row, subject.end_ids) if ends else row for row in plain]
        assert replies == wanted, "the two ways give different tokens"
    ratio = statistics.median(a / b for a, b in zip(*spent.values(), strict=True))
    figures = {f"{name}, tokens/s": tokens / statistics.median(times) for name, times in spent.items()}
    return {"tokens": tokens, **figures, "times as fast": ratio}


def _threshold(subject: Subject, batch: int, threshold: float, setting: Setting) -> dict[str, Any]:
    """Time the threshold against one token a step, in turns."""
    one = Decoding(new_tokens=setting.new_tokens, batch=batch)
    many = dataclasses.replace(one, schedule="confidence", threshold=threshold)
    rates: dict[str, list[float]] = {"one a step": [], "threshold": []}
    replies: dict[str, list[Any]] = {}
    for _ in range(setting.rounds):
        for name, options in zip(rates, (one, many), strict=True):
            seconds, canvases = _timed(lambda options=options: subject.decoder(batch, options, ends=True))
            replies[name] = [canvas.reply() for canvas in canvases]
            rates[name].append(sum(len(reply.ids) for reply in replies[name]) / seconds)
    return {
        **{f"{name}, tokens/s": statistics.median(values) for name, values in rates.items()},
        **{f"{name}, tokens/forward": _per_forward(found) for name, found in replies.items()},
        "times as fast": statistics.median(b / a for a, b in zip(*rates.values(), strict=True)),
        **_alike(replies["one a step"], replies["threshold"]),
    }


def _alike(ours: Sequence[Reply], theirs: Sequence[Reply]) -> dict[str, float]:
    """Return the share of tokens that are equal at the same place, and of whole replies."""
    pairs = list(zip(ours, theirs, strict=True))
    same = sum(a == b for old, new in pairs for a, b in zip(old.ids, new.ids, strict=False))
    longest = sum(max(len(old.ids), len(new.ids)) for old, new in pairs)
    return {
        "equal tokens": same / max(1, longest),
        "equal replies": sum(old.ids == new.ids for old, new in pairs) / len(pairs),
    }


def _bf16(name: str, setting: Setting, device: Device) -> list[dict[str, Any]]:
    """Compare a shipped model's replies in bf16 with those of other ways to compute them."""
    task = Exercises(count=setting.questions)
    exact, rough = (
        open_decoder(EXERCISES / name, device, Arithmetic(precision=kind)) for kind in ("fp32", "bf16")
    )
    asked = [exact.prompt_ids(question.messages) for question in task.questions()]
    options = dataclasses.replace(task.decoding, batch=16)
    replies = rough.decode(asked, options)
    others = {
        "without the cache": rough.decode(asked, dataclasses.replace(options, cache=False)),
        "alone": rough.decode(asked, dataclasses.replace(options, batch=1)),
        "fp32": exact.decode(asked, options),
    }
    return [
        {"model": name, "against": against, **_alike(replies, theirs)} for against, theirs in others.items()
    ]


def _exercises(name: str, batch: int, setting: Setting, device: Device) -> list[dict[str, Any]]:
    """Score a shipped model at one token a step and at thresholds; times as fast is against one a step."""
    decoder, task = open_decoder(EXERCISES / name, device), Exercises(count=setting.questions)
    questions = task.questions()
    asked = [decoder.prompt_ids(question.messages) for question in questions]
    one = dataclasses.replace(task.decoding, batch=batch)
    many = [dataclasses.replace(one, schedule="confidence", threshold=value) for value in THRESHOLDS]
    rows, first = [], 0.0
    for options in (one, *many):
        seconds, replies = _timed(lambda options=options: decoder.decode(asked, options))
        right = sum(
            task.judge(question, reply.text).score for question, reply in zip(questions, replies, strict=True)
        )
        rate = sum(len(reply.ids) for reply in replies) / seconds
        first = first or rate
        rows.append(
            {
                "model": name,
                "batch": batch,
                "threshold": options.threshold,
                "exact match": right / len(questions),
                "tokens/forward": _per_forward(replies),
                "tokens/s": rate,
                "times as fast": rate / first,
            }
        )
    return rows


def _per_forward(replies: Sequence[Any]) -> float:
    return sum(len(reply.ids) for reply in replies) / sum(reply.forwards for reply in replies)


def _cut(row: list[int], end_ids: frozenset[int]) -> list[int]:
    """Return what stands before the first end token."""
    return list(itertools.takewhile(lambda token: token not in end_ids, row))


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU-seconds and the value."""
    started = time.process_time()
    value = function()
    return time.process_time() - started, value


def main() -> None:
    """Parse, measure on one rank, print tables or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=["quickstart", "wide", "exercises"])
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=400, help="exercises; a multiple of four")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    setting = Setting(
        models=tuple(given.model or ("quickstart", "wide", "exercises")),
        batches=tuple(given.batch or (1, 16)),
        new_tokens=given.new_tokens,
        rounds=given.rounds,
        questions=given.questions,
    )
    found = run_ranks(measure, (setting,), 1, "cpu")
    if given.json:
        print(json.dumps(found))
        return
    for title, rows in found.items():
        print(title)
        for row in rows:
            print(
                "  "
                + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            )


if __name__ == "__main__":
    main()
