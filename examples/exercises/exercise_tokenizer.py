"""Make the exercises' tokenizer: a token for each word of the questions, each capital letter and each digit.

    python examples/exercises/exercise_tokenizer.py OUT_DIR

A byte-level BPE (so that any text can be read) which learns from the questions' words alone and has not seen
their letters and numbers: those stay one token a character, and an answer's tokens can be looked at one by
one. Deterministic, byte for byte.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from tokenizers import pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from tokenizer import train_bpe, write_tokenizer

WORDS = ("What is + ?", "Sort", "Reverse", "Replace by in")
"""The questions of `tide_megatron.tasks.exercises` without what varies."""
SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|mask|>")
MOST_ENTRIES = 320
"""More than there are bytes, special tokens and merges: every word becomes a token."""
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "mask_token": "<|mask|>",
    "clean_up_tokenization_spaces": False,
    "chat_template": (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}


def main(out: Path) -> None:
    """Write the tokenizer folder OUT."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    write_tokenizer(train_bpe(WORDS, splitter, size=MOST_ENTRIES, special_tokens=SPECIAL_TOKENS), CONFIG, out)


if __name__ == "__main__":
    typer.run(main)
