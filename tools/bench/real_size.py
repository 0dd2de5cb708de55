"""A student of Qwen3-0.6B's real shape in, one step, and out in all three forms: seconds and peak memory.

    python tools/bench/real_size.py --folder DIR --json      (needs 20 GB of disk; about 3 minutes on 2 cores)

Weights are random, bf16, 596,049,920 parameters, the head tied; the tokenizer has Qwen3's size and mask id
and one token a byte. Each phase is a fresh process that runs its rank by our own launcher; `peak_gib` is the
highest resident size (VmHWM) of that process, with the mapped pages of the files it reads. The phases:

- `make`: draw the student, tensor by tensor;
- `step`: `tide train` for one AdamW step of 256 tokens, checkpoint and final model written;
- `write`: `tide export --format all --no-verify`;
- `verify`: the same again over it, with `--force`, and read back in every way.

Exit code 1: a phase needs more than LIMIT_GIB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

import tide_megatron.platform

import tokenizers
import torch
from torch import Tensor

from bench.cost import STATUS, apart, machine
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.export.export import ExportOptions, export_student
from tide_megatron.export.formats import FORMATS
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models.arch.qwen3 import Qwen3
from tide_megatron.models.hf.folder import stream_folder
from tide_megatron.models.hf.safetensors import TensorSpec
from tide_megatron.models.params import hf_shapes, param_mappings
from tide_megatron.text.backends.huggingface import byte_of_character
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.loop import train
from tide_megatron.train.resolve import build_recipe

LIMIT_GIB = 14.0
WORDS, SPECIAL = 151_643, 26
"""Ordinary and special tokens of Qwen3: its mask token is the next id, 151669."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large the student is; the real one unless a test says otherwise."""

    layers: int = 28
    hidden: int = 1024
    feed_forward: int = 3072
    heads: int = 16
    groups: int = 8
    head_dim: int = 128
    vocabulary: int = 151_936
    tokens: int = 256
    """Of the one sample of the step."""

    def config(self) -> dict[str, Any]:
        """Return config.json of an A2D-Qwen3 of this size."""
        return {
            "model_type": "a2d-qwen3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 40_960,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }


def make_student(folder: Path, size: Size) -> dict[str, Any]:
    """Write a random student and a sample of data for it; return what it is."""
    architecture = Qwen3.from_hf(size.config())
    plan = {name: TensorSpec(shape, torch.bfloat16) for name, shape in hf_shapes(architecture).items()}
    stream_folder(folder / "student", size.config(), plan, _drawn(plan))
    _write_tokenizer(folder / "student")
    chat = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "tide " * size.tokens}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(folder / "student")
    source, data = [folder / "chats.jsonl"], folder / "data"
    prepare(source, tokenizer, data, max_length=size.tokens, on_long="truncate", replace=True)
    elements = sum(piece.elements for piece in param_mappings(architecture))
    return {"parameters": elements, "mask_id": tokenizer.mask_id}


def take_step(folder: Path, size: Size) -> dict[str, Any]:
    """Train the student for one step; return what the run says."""
    tree = {
        "folder": str(folder / "run"),
        "steps": 1,
        "device": "cpu",
        "student": {
            "folder": str(folder / "student"),
            "context": {"kind": "block_diffusion", "block_size": 32},
            "precision": "bf16",
        },
        "losses": {"ce": {"kind": "cross_entropy"}},
        "data": {"train": str(folder / "data")},
        "batch": {"samples": 1},
        "optimizer": {"learning_rate": 1e-4},
        "metrics": {"every": 1, "tensorboard": False},
        "checkpoints": {"asynchronous": False},  # a copy of weights and moments is not needed at the end
    }
    result: dict[str, Any] = run_ranks(train, (*build_recipe(tree), False), 1, "cpu")
    return {"skipped": result["clock"]["skipped"], "tokens": size.tokens}


def export(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Export the trained student in all forms; return what was verified."""
    choices = ExportOptions(formats=tuple(FORMATS), force=True, verify=verify)
    checks = run_ranks(export_student, (folder / "run", folder / "out", choices), 1, "cpu")
    size = sum(file.stat().st_size for file in (folder / "out").rglob("*"))
    return {"bytes": size, "checks": [dataclasses.asdict(check) for check in checks]}


def export_only(folder: Path, size: Size) -> dict[str, Any]:
    """Export without reading back."""
    return export(folder, verify=False)


def export_verified(folder: Path, size: Size) -> dict[str, Any]:
    """Export and read back."""
    return export(folder, verify=True)


PHASES: dict[str, Callable[[Path, Size], dict[str, Any]]] = {
    "make": make_student,
    "step": take_step,
    "write": export_only,
    "verify": export_verified,
}


def run_phase(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Run one phase in this process; return its figures."""
    start = time.perf_counter()
    found = PHASES[name](folder, size)
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 1), "peak_gib": round(_peak_gib(), 2), **found}


def _peak_gib() -> float:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) / 2**20


def _drawn(plan: dict[str, TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """Yield random weights; norms are ones."""
    torch.manual_seed(1)
    for name, planned in plan.items():
        if len(planned.shape) == 1:
            yield name, torch.ones(planned.shape, dtype=planned.dtype)
        else:
            yield name, torch.empty(planned.shape, dtype=planned.dtype).normal_(std=0.02)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer as long as Qwen3's, and a mask token: a token for each byte, names no text has."""
    letters = list(byte_of_character())
    names = [*letters, *(f"unused{number}" for number in range(WORDS - len(letters)))]
    words = {name: number for number, name in enumerate(names)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    rest = [f"<|special{number}|>" for number in range(SPECIAL - len(ends))]
    library.add_special_tokens([*ends, *rest, "<|mask|>"])
    library.save(str(folder / "tokenizer.json"))
    told = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


def main() -> int:
    """Run all phases; print figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where to write 20 GB; made where missing")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="which, in order")
    words = parser.parse_args()
    words.folder.mkdir(parents=True, exist_ok=True)
    figures = {name: apart(run_phase, name, words.folder, Size()) for name in words.phases}
    peak = max(phase["peak_gib"] for phase in figures.values())
    if words.json:
        told = {"machine": machine(), "limit_gib": LIMIT_GIB, "peak_gib": peak, "phases": figures}
        print(json.dumps(told, indent=1))
    else:
        for name, phase in figures.items():
            print(f"{name:8} {phase['seconds']:8.1f} s  {phase['peak_gib']:6.2f} GiB")
    return int(peak > LIMIT_GIB)


if __name__ == "__main__":
    sys.exit(main())
