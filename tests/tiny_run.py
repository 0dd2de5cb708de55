"""A whole run in a folder, in a second: tokenizer, student, mixture teacher, data, recipe.

The models have two layers and random weights that are large enough for logits to differ. Teacher and student
share one tokenizer; the teacher is called `moe`. Nothing here needs torch.distributed.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from tests.small_tokenizer import write_chats, write_other, write_tokenizer
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.hf.folder import stream_folder
from tide_megatron.models.hf.safetensors import TensorSpec
from tide_megatron.models.params import param_mappings
from tide_megatron.text.tokenizer import Tokenizer

DEVIATION = 0.2


def write_tiny_run(
    folder: Path, *, experts: int = 4, samples: int = 40, vocabulary: int = 320, held_out: int = 8
) -> Path:
    """Write `student/`, `teacher/`, `data/train`, `data/held_out`, `run.yaml` into a folder.

    Args:
        folder: made where it is missing.
        experts: experts of the teacher's second layer; two are chosen.
        samples: training samples, of 30 to 65 tokens.
        vocabulary: rows of both models; the tokenizer has 312 ids, so at least that many.
        held_out: held-out samples.

    Returns:
        The recipe's file; all paths in it are absolute.
    """
    write_model(folder / "student", student_config(vocabulary), seed=1)
    write_model(folder / "teacher", teacher_config(vocabulary, experts), seed=2)
    tokenizer = Tokenizer.load(folder / "student")
    for name, first, number in (("train", 0, samples), ("held_out", samples, held_out)):
        chats = write_chats(folder / f"{name}.jsonl", [_pair(n) for n in range(first, first + number)])
        prepare([chats], tokenizer, folder / "data" / name, max_length=128)
    return _write_recipe(folder)


def write_cross_run(folder: Path, **options: int) -> Path:
    """Write the same run with a second teacher, `own`, that has a tokenizer and a template of its own.

    Both have complementary views: `moe` under block diffusion by token, `own` bidirectional by chunk.
    """
    write_tiny_run(folder, **options)
    write_model(folder / "own", teacher_config(320, options.get("experts", 4)), seed=5)
    write_other(folder / "own")
    tokenizer, own = (Tokenizer.load(folder / name) for name in ("student", "own"))
    for name in ("train", "held_out"):
        prepare(
            [folder / f"{name}.jsonl"],
            tokenizer,
            folder / "data" / name,
            max_length=128,
            sides={"other": SideChoice(tokenizer=own)},
            replace=True,
        )
    tree = recipe_tree(folder)
    tree["teachers"]["moe"]["view"] = "complementary"
    tree["teachers"]["own"] = tree["teachers"]["moe"] | {
        "folder": str(folder / "own"),
        "context": {"kind": "bidirectional"},
    }
    tree["losses"] |= {
        "reverse": {"kind": "reverse_calm", "teacher": "own"},
        "mixed": {"kind": "calm_tidal", "teacher": "own", "temperature": 5.0},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return file


def write_pair_run(folder: Path, **options: int) -> Path:
    """Write the cross run with a third teacher, `dense`: three layers, tied, a vocabulary of odd size."""
    file = write_cross_run(folder, **({"experts": 8} | options))
    write_model(folder / "dense", student_config(333) | {"num_hidden_layers": 3, "hidden_size": 48}, seed=7)
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["teachers"]["dense"] = recipe_tree(folder)["teachers"]["moe"] | {"folder": str(folder / "dense")}
    tree["losses"]["dense"] = {
        "kind": "reverse_kl",
        "teacher": "dense",
        "shared_vocab_size": 300,
    }
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return file


PAIR_ON_FOUR = (
    "teachers.moe.layout.expert=4",
    "teachers.own.layout.expert=2",
    "teachers.dense.layout.tensor=2",
    "teachers.dense.layout.pipeline=2",
    "batch.samples=8",
    "batch.microbatch=1",
)
"""Words that put the pair run on four ranks: a layout for each teacher, two microbatches a rank."""


def copy_tiny_run(file: Path, folder: Path) -> Path:
    """Copy the run of a recipe's file into another folder, to be broken there; return its recipe's file."""
    shutil.copytree(file.parent, folder)
    return _write_recipe(folder)


def recipe_tree(folder: Path) -> dict:
    """Return what `run.yaml` says."""
    context = {"kind": "block_diffusion", "block_size": 8}
    return {
        "folder": str(folder / "run"),
        "steps": 4,
        "seed": 3,
        "device": "cpu",
        "student": {"folder": str(folder / "student"), "context": dict(context), "precision": "fp32"},
        "teachers": {
            "moe": {
                "folder": str(folder / "teacher"),
                "context": dict(context),
                "precision": "fp32",
                "sanity": "off",  # random weights know nothing
            }
        },
        "losses": {"ce": {"kind": "cross_entropy"}, "kl": {"kind": "kl", "teacher": "moe"}},
        "data": {"train": str(folder / "data/train"), "held_out": str(folder / "data/held_out")},
        "batch": {"samples": 8},
        "optimizer": {"learning_rate": 0.01},
        "evaluation": {"samples": 8, "times": [0.3, 0.7]},
        "metrics": {"every": 1, "tensorboard": False},
    }


def student_config(vocabulary: int) -> dict:
    """Return config.json of a two-layer A2D-Qwen3 with tied embeddings."""
    return {
        "model_type": "a2d-qwen3",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": vocabulary,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


def teacher_config(vocabulary: int, experts: int) -> dict:
    """Return config.json of a two-layer LLaDA2 mixture whose second layer is the mixture."""
    return {
        "model_type": "llada2_moe",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "intermediate_size": 64,
        "vocab_size": vocabulary,
        "rope_theta": 10000.0,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
    }


def write_folder(
    folder: Path, config: dict, tensors: dict[str, torch.Tensor], files: Sequence[Path] = ()
) -> None:
    """Write a model folder of tensors that are all there, by Hugging Face name."""
    plan = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    stream_folder(folder, config, plan, tensors.items(), files)


def write_model(folder: Path, config: dict, *, seed: int) -> Path:
    """Write a model folder: config, random weights, the small tokenizer."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=draw) * DEVIATION
        if piece.fill is None
        else torch.full(shape, piece.fill)
        for piece in param_mappings(ARCHITECTURES[config["model_type"]].from_hf(config))
        for name, shape in piece.sources.items()
    }
    write_folder(folder, config, tensors)
    write_tokenizer(folder)
    return folder


def _write_recipe(folder: Path) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(recipe_tree(folder), sort_keys=False), encoding="utf-8")
    return file


def _pair(number: int) -> tuple[str, str]:
    """Return a request and a reply whose lengths vary with the number."""
    ask = f"add {'again ' * (number % 4)}{number}"
    return ask, f"def f{number}():\n" + "    pass\n" * (number % 5) + f"    return {number}"
