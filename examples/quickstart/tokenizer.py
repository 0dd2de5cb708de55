"""Train the quickstart's tokenizer: a byte-level BPE of 512 entries with a small ChatML-like template.

    python examples/quickstart/tokenizer.py CORPUS_DIR OUT_DIR

reads `train.jsonl` (see corpus.py) and writes a Hugging Face tokenizer folder: `tokenizer.json` and
`tokenizer_config.json` with the chat template and the mask, end and pad tokens. It learns from chats as the
template renders them, so that role names are one token each. 512 entries are few on purpose: a student of a
quarter million parameters learns to spell within minutes, which it does not with thousands of entries.
Training is deterministic: one corpus gives one file, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers
import typer
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def read_messages(file: Path) -> Iterator[dict[str, str]]:
    """Yield every message of a chat file."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield from json.loads(line)["messages"]


def train_bpe(
    texts: Iterable[str],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    *,
    size: int,
    special_tokens: Sequence[str] = (),
) -> tokenizers.Tokenizer:
    """Return a byte-level BPE of `size` entries, the special tokens first, learnt from texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, config: Mapping[str, object], out: Path) -> None:
    """Write a tokenizer folder."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    typer.echo(f"{out}: {tokenizer.get_vocab_size()} entries")


def main(corpus: Path, out: Path) -> None:
    """Train on CORPUS/train.jsonl and write the tokenizer folder OUT."""
    # Every turn as the template shows it.
    turns = (f"{turn['role']}\n{turn['content']}" for turn in read_messages(corpus / "train.jsonl"))
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    write_tokenizer(
        train_bpe(turns, splitter, size=VOCABULARY_SIZE, special_tokens=SPECIAL_TOKENS), CONFIG, out
    )


if __name__ == "__main__":
    typer.run(main)
