"""Record or compare what SGLang and LMDeploy read of an exported SDAR folder.

    python tools/servers.py 'sglang 0.5.23' FOLDER            # compare with the table; else 1
    python tools/servers.py 'lmdeploy 0.18.0' FOLDER --write  # record

FOLDER holds `sglang/` or `lmdeploy/`: an unpacked wheel, or the part of a checkout that does. Sources are
parsed, never imported. The table (tests/unit/export/servers.json) says for each release which tensors its
model class loads and how they are sized, which keys of config.json it reads, which mask token and block size
it assumes, what its algorithm takes from the YAML file, and which flags there are;
tests/unit/export/test_servers.py holds an export against it.
"""

import ast
import sys
from pathlib import Path

from release_table import compare_or_record

TABLE = Path(__file__).parent.parent / "tests" / "unit" / "export" / "servers.json"
MODEL = "SDARForCausalLM"
DLLM, ARGUMENTS = "sglang/srt/dllm", "sglang/srt/arg_groups/fields"
PYTORCH, CLI = "lmdeploy/pytorch", "lmdeploy/cli"
WANTED = {
    "sglang": {
        "model": "sglang/srt/models/sdar.py",
        "config": ["sglang/srt/models/sdar.py"],
        "assumed": f"{DLLM}/config.py",
        "algorithm": [f"{DLLM}/config.py", f"{DLLM}/algorithm/low_confidence.py"],
        "flags": [f"{ARGUMENTS}/{name}.py" for name in ("exec_", "model", "parallel", "schedule", "serving")],
    },
    "lmdeploy": {
        "model": f"{PYTORCH}/models/sdar.py",
        "config": [
            f"{PYTORCH}/models/sdar.py",
            f"{PYTORCH}/configurations/default.py",
            f"{PYTORCH}/nn/rotary_embedding.py:get_rope_theta",
            f"{PYTORCH}/nn/rotary_embedding.py:build_rotary_embedding_from_config",
        ],
        "assumed": f"{PYTORCH}/configurations/sdar.py",
        "algorithm": [],
        "flags": [f"{CLI}/utils.py", f"{CLI}/serve.py"],
    },
}
FLAGS = [
    *("--model-path", "--trust-remote-code", "--dllm-algorithm", "--dllm-algorithm-config"),
    *("--max-running-requests", "--port", "--tp-size", "--backend", "--dtype", "--tp", "--server-port"),
    *("--dllm-block-length", "--dllm-unmasking-strategy", "--dllm-confidence-threshold"),
]
"""Those that an exported folder's SERVING.md names."""
HOLD_A_MATRIX = ("Linear", "Embedding", "LMHead", "Norm", "_linear", "_proj")
"""How the names of what holds one `weight` end, classes and builders."""
SIZES = {"num_q_heads", "num_kv_heads", "head_size"}
"""Arguments by name that size a matrix."""
CONFIGS = {"config", "hf_config"}
OWN = {"dllm_block_length", "update", "get"}
"""What LMDeploy puts into a configuration itself, and methods."""


def main(words=None):
    """Compare or record; return the exit code."""
    return compare_or_record(words, __doc__, TABLE, facts, changes)


def changes(recorded, found):
    """Say which facts are not those of the table."""
    return [
        f"{key}: {now}, in the table {recorded.get(key)}"
        for key, now in found.items()
        if recorded.get(key) != now
    ]


def facts(folder, release):
    """Read what `WANTED` names of a release."""
    wanted = WANTED[release.partition(" ")[0]]

    def tree(place):
        file, _, name = place.partition(":")
        whole = ast.parse((folder / file).read_text(encoding="utf-8"))
        return whole if not name else next(one for one in whole.body if getattr(one, "name", "") == name)

    flags = set().union(*(flags_of(tree(file)) for file in wanted["flags"] if (folder / file).is_file()))
    return {
        "tensors": tensors(tree(wanted["model"])),
        "reads": {place: keys_read(tree(place)) for place in wanted["config"]},
        "assumes": assumed(tree(wanted["assumed"])),
        "algorithm": {
            key: value for file in wanted["algorithm"] for key, value in file_keys(tree(file)).items()
        },
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "read_in": sorted({*wanted["config"], wanted["model"], wanted["assumed"], *wanted["algorithm"]}),
    }


def tensors(model):
    """Return the names of a checkpoint's tensors, layers as `*` -> the arguments that size each."""
    classes = {one.name: one for one in model.body if isinstance(one, ast.ClassDef)}
    stacked = {}
    for one in ast.walk(classes[MODEL]):
        if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "stacked_params_mapping":
            for whole, part, _ in ast.literal_eval(one.value):
                stacked.setdefault(whole.strip("."), []).append(part.strip("."))
    names = {}
    for path, sizes in matrices(classes, MODEL):
        *parents, last = path
        for name in stacked.get(last, [last]):
            names[".".join([*parents, name, "weight"])] = sizes
    return names


def matrices(classes, name):
    """Yield the path of every matrix under a class of the file, and its builder's positional arguments."""
    start = next(one for one in classes[name].body if getattr(one, "name", "") == "__init__")
    for one in ast.walk(start):
        target = one.targets[0] if isinstance(one, ast.Assign) else None
        target = target.elts[0] if isinstance(target, ast.Tuple) else target
        if not isinstance(target, ast.Attribute) or ast.unparse(target.value) != "self":
            continue
        calls = [call for call in ast.walk(one.value) if isinstance(call, ast.Call)]
        inner = [call for call in calls if called(call) in classes]
        if inner:
            step = [target.attr] if inner[0] is one.value else [target.attr, "*"]
            yield from (([*step, *path], sizes) for path, sizes in matrices(classes, called(inner[0])))
        elif isinstance(one.value, ast.Call) and called(one.value).endswith(HOLD_A_MATRIX):
            sized = [*one.value.args, *(key.value for key in one.value.keywords if key.arg in SIZES)]
            yield [target.attr], ", ".join(ast.unparse(size) for size in sized)


def called(call):
    """Return the last word of what is called."""
    return ast.unparse(call.func).rpartition(".")[2]


def keys_read(tree):
    """Return the keys of config.json that are read -> `required`, or what stands in for a missing one."""
    required, spared = {}, {}
    for one in ast.walk(tree):
        if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Load):
            if is_config(one.value) and one.attr not in OWN:
                required[one.attr] = "required"
        elif isinstance(one, ast.Call) and called(one) in ("getattr", "hasattr") and is_config(one.args[0]):
            instead = ast.unparse(one.args[2]) if len(one.args) > 2 else "nothing"
            spared[ast.literal_eval(one.args[1])] = instead
    guarded = {key: instead for key, instead in spared.items() if instead == "nothing"}
    return {**spared, **required, **guarded}


def is_config(node):
    """Say whether an expression is the model's configuration."""
    return ast.unparse(node).rpartition(".")[2] in CONFIGS


def assumed(tree):
    """Return the numbers that are built in for the architecture."""
    for one in ast.walk(tree):
        if isinstance(one, ast.Dict):
            for key, value in zip(one.keys, one.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == MODEL:
                    return ast.literal_eval(value)
    return {
        one.targets[0].attr: one.value.value
        for one in ast.walk(tree)
        if isinstance(one, ast.Assign)
        and isinstance(one.targets[0], ast.Attribute)
        and isinstance(one.value, ast.Constant)
    }


def file_keys(tree):
    """Return the keys of the algorithm's file -> what stands in for a missing one."""
    return {
        one.args[0].value: ast.unparse(one.args[1])
        for one in ast.walk(tree)
        if isinstance(one, ast.Call)
        and isinstance(one.func, ast.Attribute)
        and one.func.attr == "get"
        and ast.unparse(one.func.value).endswith("algorithm_config")
    }


def flags_of(tree):
    """Return command-line flags: fields of an options class, or words given to `add_argument`."""
    fields = {
        f"--{one.target.id.replace('_', '-')}"
        for one in ast.walk(tree)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
    words = {
        word.value
        for one in ast.walk(tree)
        if isinstance(one, ast.Call) and called(one) == "add_argument"
        for word in one.args
        if isinstance(word, ast.Constant) and str(word.value).startswith("--")
    }
    return fields | words


if __name__ == "__main__":
    sys.exit(main())
