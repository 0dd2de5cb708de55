"""Record or compare the signatures of megatron-core and Transformer Engine that our layers stand on.

    python tools/signatures.py 'megatron-core 0.19.2' FOLDER            # compare with the table; else 1
    python tools/signatures.py 'megatron-core 0.19.2' FOLDER --write    # record

FOLDER holds `megatron/` or `transformer_engine/`: a site-packages, or an unpacked wheel. Sources are parsed,
never imported, so a GPU's libraries are read on any machine. The table (tests/unit/models/signatures.json)
says for each release what a function takes, what a class of options has, and which arguments megatron-core
hands to Transformer Engine; tests/unit/models/test_signatures.py holds the one against the other.
"""

import ast
import sys
from pathlib import Path

from release_table import compare_or_record

TABLE = Path(__file__).parent.parent / "tests" / "unit" / "models" / "signatures.json"
SPEC, TE = "megatron/core/models/gpt/gpt_layer_specs.py", "megatron/core/extensions/transformer_engine.py"
MODULES = "transformer_engine/pytorch/module"
FUSED = f"{MODULES}/layernorm_linear.py"
WANTED = {
    "megatron-core": {
        "takes": [
            f"{SPEC}:get_gpt_decoder_block_spec",
            "megatron/core/models/gpt/gpt_model.py:GPTModel.__init__",
            "megatron/core/models/gpt/gpt_model.py:GPTModel.sharded_state_dict",
            "megatron/core/transformer/transformer_layer.py:TransformerLayer._forward_attention",
            "megatron/core/transformer/transformer_layer.py:TransformerLayer._forward_mlp",
            "megatron/core/transformer/moe/experts.py:TEGroupedMLP.__init__",
            f"{TE}:TENorm.__new__",
        ],
        "has": [
            "megatron/core/model_parallel_config.py:ModelParallelConfig",
            "megatron/core/transformer/transformer_config.py:TransformerConfig",
            "megatron/core/transformer/transformer_layer.py:TransformerLayerSubmodules",
            "megatron/core/transformer/transformer_block.py:TransformerBlockSubmodules",
            "megatron/core/transformer/attention.py:SelfAttentionSubmodules",
        ],
        "hands": {  # class or function of megatron-core: what of Transformer Engine it calls
            f"{TE}:TENorm": f"{MODULES}/rmsnorm.py:RMSNorm.__init__",
            f"{TE}:TELinear": f"{MODULES}/linear.py:Linear.__init__",
            f"{TE}:TELayerNormColumnParallelLinear": f"{FUSED}:LayerNormLinear.__init__",
            f"{TE}:TEGroupedLinear": f"{MODULES}/grouped_linear.py:GroupedLinear.__init__",
        },
    },
    "transformer_engine": {
        "takes": [
            *(
                f"{MODULES}/{file}.py:{name}.{method}"
                for file, name in (
                    ("linear", "Linear"),
                    ("layernorm_linear", "LayerNormLinear"),
                    ("grouped_linear", "GroupedLinear"),
                )
                for method in ("__init__", "forward")
            ),
            f"{MODULES}/rmsnorm.py:RMSNorm.__init__",
            "transformer_engine/pytorch/cpu_offload.py:get_cpu_offload_context",
            *(
                f"transformer_engine/pytorch/permutation.py:moe_{name}"
                for name in (
                    "permute",
                    "permute_with_probs",
                    "unpermute",
                    "sort_chunks_by_index",
                    "sort_chunks_by_index_with_probs",
                )
            ),
        ],
        "has": [],
        "hands": {},
    },
}
CALLS = {"__init__", "RMSNorm", "norm_module"}
"""How a wrapper's call of what it wraps is written."""
SHARED = "_get_extra_te_kwargs"
"""Makes arguments that every wrapper hands on."""


def main(words=None):
    """Compare or record; return the exit code."""
    return compare_or_record(words, __doc__, TABLE, signatures, differences)


def signatures(folder, release):
    """Read what `WANTED` names of a release."""
    wanted, trees = WANTED[release.partition(" ")[0]], {}

    def find(place):
        file, _, path = place.partition(":")
        if file not in trees:
            trees[file] = ast.parse((folder / file).read_text(encoding="utf-8"))
        node = trees[file]
        for name in path.split("."):
            node = next(
                one
                for one in ast.walk(node)
                if isinstance(one, (ast.ClassDef, ast.FunctionDef)) and one.name == name
            )
        return node

    return {
        "takes": {place: " ".join(parameters(find(place))) for place in wanted["takes"]},
        "has": {place: " ".join(fields(find(place))) for place in wanted["has"]},
        "hands": {
            place: " ".join(sorted(handed(find(place)) | handed(find(f"{TE}:{SHARED}"))))
            for place in wanted["hands"]
        },
    }


def parameters(function):
    """Return a function's parameters: `name=` with a default, `*name` and `**name` for the rest."""
    given = function.args
    plain = [one.arg for one in (*given.posonlyargs, *given.args)]
    optional = len(given.defaults)
    names = [f"{name}=" if number >= len(plain) - optional else name for number, name in enumerate(plain)]
    if given.vararg:
        names.append(f"*{given.vararg.arg}")
    names += [
        one.arg if default is None else f"{one.arg}="
        for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    return [*names, f"**{given.kwarg.arg}"] if given.kwarg else names


def fields(kind):
    """Return the fields that a class of options declares itself."""
    return sorted(one.target.id for one in kind.body if isinstance(one, ast.AnnAssign))


def handed(node):
    """Return the arguments by name that a wrapper hands on, written as such or put into a dict of extras."""
    found = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Call):
            name = one.func.attr if isinstance(one.func, ast.Attribute) else getattr(one.func, "id", "")
            if name in CALLS:
                found |= {keyword.arg for keyword in one.keywords if keyword.arg}
        elif isinstance(one, ast.Subscript) and isinstance(one.ctx, ast.Store):
            if "kwargs" in ast.unparse(one.value) and isinstance(one.slice, ast.Constant):
                found.add(one.slice.value)
        elif isinstance(one, ast.Assign) and "kwargs" in ast.unparse(one.targets[0]):
            found |= {key.value for key in getattr(one.value, "keys", []) if isinstance(key, ast.Constant)}
    return found


def differences(recorded, found):
    """Say in lines where sources are another than the table."""
    lines = []
    for kind, places in found.items():
        for place, now in places.items():
            before = recorded.get(kind, {}).get(place)
            if before != now:
                lines.append(f"{place} {kind} {now}, in the table {before}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
