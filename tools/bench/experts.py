"""What a mixture layer costs by the form of its experts: one layer, router and combination with it, in turns.

    python tools/bench/experts.py              (quickstart's teacher and a 32-expert layer, about a minute)
    python tools/bench/experts.py --shape mini --precision bf16 --tokens 4096     (LLaDA2-mini's, on a GPU)

`before` is megatron-core's layer as it is: its dispatcher, a feed-forward layer per expert. The others have
our dispatcher and a form of `tide_megatron/models/experts.py`; `padded` is a batched product over experts
filled up to the longest, which is measured here only. All take turns in one process; the figure is the median
of the ratios of neighbours, on a CPU in CPU-seconds. With OMP_NUM_THREADS=1 a busy machine changes it least.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import build_model
from tide_megatron.models.experts import LoopedExperts
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

COMMON = {
    "model_type": "llada2_moe",
    "num_hidden_layers": 1,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1e4,
}
SHAPES: dict[str, dict[str, int]] = {
    "quickstart": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "moe_intermediate_size": 160,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "32 experts": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    },
    "mini": {
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
    },
}


class PaddedExperts(LoopedExperts):
    """Experts as one batched product each, filled up with zero rows to the longest."""

    def _product(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        """Multiply each expert's rows by the transpose of its weight of a name."""
        starts = ends - ends.diff(prepend=ends.new_zeros(1))
        longest = int((ends - starts).max())
        place = torch.arange(len(rows), device=rows.device)
        expert = torch.searchsorted(ends, place, right=True)
        place = expert * longest + place - starts[expert]
        filled = rows.new_zeros(len(ends) * longest, rows.shape[1]).index_copy(0, place, rows)
        stack = torch.stack(self._weights(name)).transpose(1, 2)
        return torch.bmm(filled.view(len(ends), longest, -1), stack).flatten(0, 1).index_select(0, place)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured."""

    shapes: tuple[str, ...]
    tokens: int
    rounds: int
    precision: str
    trained: bool


def measure(setting: Setting, *, device: Device, stop: StopFlag) -> dict[str, dict[str, float]]:
    """Time all forms in turns on this rank; return by shape milliseconds, and ratios to `before`."""
    return {shape: _measure(shape, setting, device) for shape in setting.shapes}


def _measure(shape: str, setting: Setting, device: Device) -> dict[str, float]:
    layers = _layers(shape, setting, device)
    hidden = torch.randn(setting.tokens, 1, SHAPES[shape]["hidden_size"], device=device.torch_device)
    hidden = hidden.to(next(layers["before"].shared_experts.parameters()).dtype).requires_grad_(
        setting.trained
    )
    spent: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(setting.rounds + 1):
        for name, layer in layers.items():
            taken = _seconds(layer, hidden, device)
            if turn:  # the first turn warms up
                spent[name].append(taken)
    found = {f"{name}, ms": 1000 * statistics.median(values) for name, values in spent.items()}
    for name in layers:
        if name != "before":
            pairs = zip(spent["before"], spent[name], strict=True)
            found[f"before / {name}"] = statistics.median(old / new for old, new in pairs)
    return found


def _layers(shape: str, setting: Setting, device: Device) -> dict[str, Any]:
    """Return one mixture layer with the same weights in each form."""
    architecture = ARCHITECTURES["llada2_moe"].from_hf({**COMMON, **SHAPES[shape]})
    layers = {}
    for name in ("before", "sequential", "loop", "grouped", "padded"):
        options = ModelOptions(
            device=device,
            precision=Precision.on(setting.precision, device),
            trainable=setting.trained,
            experts={"before": "sequential", "padded": "loop"}.get(name, name),
        )
        model = build_model(architecture, make_groups(Layout()), options)
        draw_weights(model, 1)
        layers[name] = layer = model.decoder.layers[0].mlp
        if name == "padded":
            layer.experts.__class__ = PaddedExperts
        if name == "before":
            layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
                layer.num_local_experts, layer.local_expert_indices, layer.config, model.groups
            )
    return layers


def _seconds(layer: Any, hidden: Tensor, device: Device) -> float:
    """Time one forward pass, and of a trained layer the backward pass, to its end on the device."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    with torch.set_grad_enabled(hidden.requires_grad):
        out = layer(hidden)[0]
    if hidden.requires_grad:
        out.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    """Parse, measure on one rank, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--trained", action="store_true", help="time the backward pass, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json, device = given.pop("json"), given.pop("device")
    shapes = tuple(given.pop("shape") or ("quickstart", "32 experts"))
    found = run_ranks(measure, (Setting(shapes=shapes, **given),), 1, device)
    if as_json:
        print(json.dumps(found))
        return
    for shape, figures in found.items():
        print(f"{shape}, {given['tokens']} tokens")
        for name, value in figures.items():
            print(f"  {name:20} {value:8.2f}")


if __name__ == "__main__":
    main()
