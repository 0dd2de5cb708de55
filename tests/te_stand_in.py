"""What megatron-core wraps of Transformer Engine, in plain torch: its layers are built and run on a CPU.

Constructors take what the real ones of 2.17.1 take and nothing else (`tools/signatures.py` read that from
their sources), parameters have their names, shapes and devices. `install` must come before the first import
of megatron-core. As a program it compares models of both engines, every architecture, and prints a line each.
"""

import contextlib
import importlib
import importlib.machinery
import json
import sys
import types

import torch
from torch.nn import Module, Parameter
from torch.nn.functional import linear

import signatures

VERSION = "2.17.1"
TAKES = json.loads(signatures.TABLE.read_text(encoding="utf-8"))[f"transformer_engine {VERSION}"]["takes"]


def taken(place, names):
    """Refuse an argument that the real function does not take."""
    known = {word.rstrip("=") for word in TAKES[place].split()}
    unknown = set(names) - known - {"device"} if "**kwargs" in known else set(names) - known
    if unknown:
        raise TypeError(f"{place} takes no {sorted(unknown)}")


class Layer(Module):
    """What every layer of it has: a state beside its weights, empty without FP8."""

    place = ""

    def __init__(self, **given):
        super().__init__()
        taken(self.place, given)
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False, "recipe": None}
        self.given = given

    def empty(self, *shape):
        given = self.given
        return Parameter(torch.empty(*shape, dtype=given["params_dtype"], device=given["device"]))

    def init_fp8_metadata(self, num_gemms=1):
        """There is none."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or not state.numel()


def normed(states, weight, eps, is_centered):
    wide = states.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (weight.float() + is_centered)).to(states.dtype)


class RMSNorm(Layer):
    place = f"{signatures.MODULES}/rmsnorm.py:RMSNorm.__init__"

    def __init__(self, **given):
        super().__init__(**given)
        self.weight = self.empty(given.get("normalized_shape") or given["hidden_size"])

    def forward(self, states):
        return normed(states, self.weight, self.given["eps"], self.given["zero_centered_gamma"])


class Linear(Layer):
    place = f"{signatures.MODULES}/linear.py:Linear.__init__"

    def __init__(self, **given):
        super().__init__(**given)
        self.in_features, self.out_features = given["in_features"], given["out_features"]
        self.parallel_mode, self.use_bias = given["parallel_mode"], given["bias"]
        assert given["tp_size"] == 1, "the stand-in knows one rank"
        self.weight = self.empty(self.out_features, self.in_features)
        self.bias = self.empty(self.out_features) if self.use_bias else None

    def forward(self, states, is_first_microbatch=None):
        if self.given["return_bias"]:
            return linear(states, self.weight), self.bias
        return linear(states, self.weight, self.bias)


class LayerNormLinear(Linear):
    place = f"{signatures.FUSED}:LayerNormLinear.__init__"

    def __init__(self, **given):
        super().__init__(**given)
        assert given["normalization"] == "RMSNorm"
        assert not given["return_layernorm_output"]
        self.layer_norm_weight = self.empty(self.in_features)

    def forward(self, states, is_first_microbatch=None):
        given = self.given
        return super().forward(
            normed(states, self.layer_norm_weight, given["eps"], given["zero_centered_gamma"])
        )


class GroupedLinear(Layer):
    place = f"{signatures.MODULES}/grouped_linear.py:GroupedLinear.__init__"

    def __init__(self, **given):
        super().__init__(**given)
        self.num_gemms, self.use_bias = given["num_gemms"], given["bias"]
        self.single_grouped_weight = given.get("single_grouped_weight", False)
        assert not self.use_bias
        assert not given["return_bias"]
        for number in range(self.num_gemms):
            weight = self.empty(given["out_features"], given["in_features"])
            self.register_parameter(f"weight{number}", weight)

    def forward(self, states, m_splits, is_first_microbatch=None):
        runs = enumerate(torch.split(states, list(m_splits)))
        return torch.cat([linear(run, getattr(self, f"weight{number}")) for number, run in runs])


def moe_permute_with_probs(inp, probs, routing_map, num_out_tokens):
    rows, mask = torch.arange(len(inp)), routing_map.bool().T.contiguous()
    order = rows.expand_as(mask).masked_select(mask)
    return inp.index_select(0, order), probs.T.contiguous().masked_select(mask), order


def moe_unpermute(inp, row_id_map, merging_probs=None, restore_shape=None, pad_offsets=None):
    assert merging_probs is None, "our weights are applied inside the experts"
    assert pad_offsets is None
    return torch.zeros(restore_shape, dtype=inp.dtype).index_add(0, row_id_map, inp)


def moe_sort_chunks_by_index(inp, split_sizes, sorted_index):
    chunks = torch.split(inp, split_sizes.tolist())
    return torch.cat([chunks[number] for number in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(inp, probs, split_sizes, sorted_index):
    return tuple(moe_sort_chunks_by_index(part, split_sizes, sorted_index) for part in (inp, probs))


class Anything(types.ModuleType):
    """A module in which every class is found, to be derived from or named in an annotation."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Module,), {"is_fp8_enabled": staticmethod(lambda: False)})


class Finder:
    """Gives modules of it that megatron-core imports without asking whether they are there."""

    LACKING = ("transformer_engine.pytorch.optimizers", "transformer_engine.pytorch.attention")
    """For which megatron-core falls back to torch: its Adam, its split."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.startswith("transformer_engine") and name not in cls.LACKING:
            return importlib.machinery.ModuleSpec(name, cls)
        return None

    @staticmethod
    def create_module(spec):
        return Anything(spec.name)

    @staticmethod
    def exec_module(module):
        for name, value in GIVEN.get(module.__name__, {}).items():
            setattr(module, name, value)


def get_cpu_offload_context(enabled, *rest, **given):
    taken("transformer_engine/pytorch/cpu_offload.py:get_cpu_offload_context", given)
    assert not enabled
    return contextlib.nullcontext(), lambda states: states


GIVEN = {
    "transformer_engine": {"__version__": VERSION},
    "transformer_engine.pytorch": {
        kind.__name__: kind for kind in (RMSNorm, Linear, LayerNormLinear, GroupedLinear)
    },
    "transformer_engine.pytorch.cpu_offload": {"get_cpu_offload_context": get_cpu_offload_context},
    "transformer_engine.pytorch.permutation": {
        function.__name__: function
        for function in (
            moe_permute_with_probs,
            moe_unpermute,
            moe_sort_chunks_by_index,
            moe_sort_chunks_by_index_with_probs,
        )
    },
}


def install():
    """Put the stand-in where Transformer Engine would be, on what counts as a machine with a GPU."""
    sys.meta_path.insert(0, Finder)
    for name in ("", ".pytorch", ".pytorch.ops", ".pytorch.distributed", ".common", ".common.recipe"):
        importlib.import_module(f"transformer_engine{name}")
    torch.cuda.device_count = lambda: 1


if __name__ == "__main__":
    install()
    from tests.te_layers import compare_all

    compare_all()
