"""A byte-level BPE of a few hundred entries, trained when a test asks for it, with a ChatML-like template."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = (
    "{% for m in messages %}<role>{{ m['role'] | upper }}</role>"
    "{{ m['content'] | trim }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
TEXTS = ["user\nwhat does this function do", "assistant\ndef add(left, right):\n    return left + right"]


def write_tokenizer(folder, *, special=("<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>"), **config):
    """Write a tokenizer folder; `config` adds to or (None) takes from tokenizer_config.json."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    content = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": CHATML} | config
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def write_other(folder):
    """Write a tokenizer that cuts otherwise: characters of two classes, single digits, another template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|[A-Za-z]{1,4}|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>", "<role>", "</role>", "<|role_end|>", "<|mask|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["return left add(left right) same 日本 👩"] * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, eos_token="<|end|>", pad_token="<|end|>", chat_template=ROLES)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def write_chats(file, pairs):
    """Write a JSONL file of (request, reply) pairs."""
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]},
            ensure_ascii=False,
        )
        for ask, reply in pairs
    ]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file
