"""Train the tokenizer of the cross-tokenizer teacher: a byte-level BPE of 1,024 entries, roles in capitals.

    python examples/cross_tokenizer/teacher_tokenizer.py CORPUS_DIR OUT_DIR

reads `train.jsonl` (see examples/quickstart/corpus.py). It differs from the student's 512 entries in all that
can differ between two tokenizers of one text: twice the entries, another splitting (a sign joins the word
behind it, as in `.join` or `_name`; a line break takes the indentation along; digits stand alone), special
tokens behind the vocabulary instead of before it, another mask id, and a template after LLaDA2's that names
roles HUMAN and ASSISTANT between tokens of their own. No id means the same on both sides but by chance.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import typer
from tokenizers import pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from tokenizer import read_messages, train_bpe, write_tokenizer

VOCABULARY_SIZE = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|role_end|>", "<role>", "</role>", "<|mask|>")
SPLITS = r"\n\s*|\p{N}|[^\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"
"""What is never merged across: line break with indentation, one digit, a word, signs, any other space."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set role = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'}[message['role']] %}"
    "<role>{{ role }}</role>{{ message['content'] }}<|role_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|role_end|>",
    "pad_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def read_texts(file: Path) -> Iterator[str]:
    """Yield every content, and every role as the template writes it, so that roles become tokens."""
    for message in read_messages(file):
        yield "HUMAN" if message["role"] == "user" else "ASSISTANT"
        yield message["content"]


def main(corpus: Path, out: Path) -> None:
    """Train on CORPUS/train.jsonl and write the tokenizer folder OUT."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLITS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    size = VOCABULARY_SIZE - len(SPECIAL_TOKENS)
    tokenizer = train_bpe(read_texts(corpus / "train.jsonl"), splitter, size=size)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    write_tokenizer(tokenizer, CONFIG, out)


if __name__ == "__main__":
    typer.run(main)
