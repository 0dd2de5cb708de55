"""Random models with a tokenizer, on one rank, that the tests of decoding share."""

import dataclasses

import torch

from tests.small_tokenizer import write_tokenizer
from tests.unit.models.shapes import build
from tide_megatron.decode.decoder import Decoder
from tide_megatron.diffusion.mask import Context
from tide_megatron.text.tokenizer import Tokenizer

BLOCKS = Context(kind="block_diffusion", block_size=8)


def load_tokenizer(folder):
    return Tokenizer.load(write_tokenizer(folder))


def make_decoder(tokenizer, config, groups, *, context=BLOCKS, shift=None, seed=1, **changes):
    """Build a random model whose logits lie far apart, with a few rows that no token has."""
    spread = "init_std" if "init_std" in config else "initializer_range"
    changes = {"vocab_size": tokenizer.vocabulary_size + 3, spread: 0.3, **changes}
    if "embedding_size" in config:
        changes["embedding_size"] = changes["vocab_size"]
    model = build(config, groups, seed=seed, **changes)
    if shift is not None:
        model.architecture = dataclasses.replace(model.architecture, is_shifted=shift)
    return Decoder(model, tokenizer, context)


def prompts(lengths, *, vocabulary=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in lengths]
