"""A folder of results: which model it is of, what was asked of each task, answers, scores.

    RESULTS/model.json            what the model is: two models never share a folder
    RESULTS/TASK/asked.json       what was asked, and how it was to be answered
    RESULTS/TASK/answers-*.jsonl  answers, as they came (`answers.py`)
    RESULTS/TASK/scores.json      each question's score
    RESULTS/TASK/result.json      the task's result
    RESULTS/result.json           all of them; result.md shows them

What decides an answer is written down before the first one, and a folder of anything else is refused by name.
How many questions are asked is no part of it: their order is fixed, and more of them go on where fewer ended.
Nor is what only costs time: batch, ranks, the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import ConfigError
from tide_megatron.base.files import write_text
from tide_megatron.base.read import json_of
from tide_megatron.decode.decoder import Decoder
from tide_megatron.evaluate.options import Arithmetic
from tide_megatron.models.fingerprint import sampled_weights
from tide_megatron.tasks.task import Question

MODEL, ASKED, SCORES, RESULT, TABLE = "model.json", "asked.json", "scores.json", "result.json", "result.md"
_MOST_TOLD = 5
_COSTS = ("batch", "cache")
"""Fields of `Decoding` that decide only the speed of replies."""
_MISSING = "nothing"


def claim(file: Path, facts: Mapping[str, Any], what: str) -> None:
    """Write down what decides the answers of a folder, or make sure that it is what stands there.

    Args:
        file: of the folder.
        facts: JSON values.
        what: the folder's answers belong to, for the message.

    Raises:
        ConfigError: something else stands there; says what differs.
        OSError: the disk refuses.
    """
    facts = json.loads(json.dumps(facts))  # as they come back
    try:
        there = json_of(file)
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(facts, indent=1) + "\n")
        return
    except ValueError as fault:
        raise ConfigError(f"{file}: not readable ({fault}); give another --out") from None
    if told := differences_told(there, facts):
        raise ConfigError(f"--out: {file.parent} holds answers of another {what}: {told}; give another --out")


def deciding(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """Return those fields of `Decoding` that decide replies, and not only their speed."""
    return {name: value for name, value in decoding.items() if name not in _COSTS}


def differences_told(there: Any, here: Any) -> str:
    """Say in what two JSON values differ, the first few keys by name; empty: in nothing."""
    found = differences(there, here)
    more = f" and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
    return f"{'; '.join(found[:_MOST_TOLD])}{more}"


def differences(there: Any, here: Any, key: str = "") -> list[str]:
    """Say in what two JSON values differ, key by key."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = dict.fromkeys([*there, *here])
        return [
            line
            for name in names
            for line in differences(
                there.get(name, _MISSING), here.get(name, _MISSING), f"{key}.{name}" if key else str(name)
            )
        ]
    return [] if there == here else [f"{key} is {there!r} there, {here!r} here"]


def model_facts(decoder: Decoder, arithmetic: Arithmetic | None) -> dict[str, Any]:
    """Return what decides a model's replies beside the prompts and how they are decoded.

    Args:
        decoder: the model.
        arithmetic: it was opened with; None: as `auto` has it.
    """
    chosen = arithmetic or Arithmetic()
    return {
        "weights": sampled_weights(decoder.model.parameters()),
        "tokenizer": decoder.tokenizer.digest,
        "mask": decoder.tokenizer.special_tokens["mask_token"],
        "context": dataclasses.asdict(decoder.context),
        "numbers": str(decoder.model.head_weight.dtype).removeprefix("torch."),
        "engine": chosen.engine,
        "fp8": chosen.fp8.recipe if chosen.fp8 else None,
    }


def questions_digest(questions: Sequence[Question]) -> str:
    """Name a task's questions by content (sha256, 16 hexadecimal digits)."""
    found = hashlib.sha256()
    for question in questions:
        parts = [question.name, [dict(message) for message in question.messages], question.prefix]
        found.update(json.dumps([*parts, dict(question.data)], sort_keys=True).encode())
    return found.hexdigest()[:16]


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file, all of it or none."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def scores_of(folder: Path) -> dict[str, dict[str, float]]:
    """Return task -> question -> score of a folder of results.

    Raises:
        ConfigError: there are none, or a file that is none of ours.
    """
    found = {}
    for file in sorted(folder.glob(f"*/{SCORES}")):
        try:
            scores = json_of(file)
            found[file.parent.name] = {str(name): float(score) for name, score in scores.items()}
        except (ValueError, AttributeError, TypeError) as fault:
            raise ConfigError(f"{file}: no scores of ours ({fault}); evaluate that model again") from None
    if not found:
        raise ConfigError(f"--against: {folder} has no results of tide evaluate --tasks; give such a folder")
    return found
