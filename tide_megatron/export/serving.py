"""How a server is started on an export and how its answers differ from ours: SERVING.md, and SGLang's file.

What is said here of SGLang and LMDeploy was read in the sources of the releases in `READ_IN`; a test holds
flags, keys and tensors against a table of facts that was taken from them (`tools/servers.py`).
"""

from __future__ import annotations

from pathlib import Path

from tide_megatron.export import configuration_sdar
from tide_megatron.export.formats import ExportFormat
from tide_megatron.export.student import TrainedStudent

SERVING_FILE = "SERVING.md"
SERVER_FILE = "sglang_dllm.yaml"
READ_IN = {"SGLang": "0.5.23", "LMDeploy": "0.18.0"}
THRESHOLD = 0.95
"""Confidence from which a token is committed: SGLang's own, and told to LMDeploy, which would take 0.85."""


def write_server_files(folder: Path, form: ExportFormat, student: TrainedStudent) -> None:
    """Write what servers need beside config and weights, and how they are started.

    Args:
        folder: the export's.
        form: one that serves blocks.
        student: with its block size.
    """
    assert student.block_size is not None, f"{form.name} goes out with a block size only"
    code = Path(configuration_sdar.__file__)
    (folder / code.name).write_bytes(code.read_bytes())
    (folder / SERVER_FILE).write_text(sglang_options(student.block_size), encoding="utf-8")
    (folder / SERVING_FILE).write_text(serving_page(form, student, student.block_size), encoding="utf-8")


def sglang_options(block_size: int) -> str:
    """Return the YAML file that SGLang's `--dllm-algorithm-config` reads."""
    return (
        "# Options of --dllm-algorithm LowConfidence.\n"
        f"block_size: {block_size} # tokens; the trained one, where SGLang would take 4\n"
        f"threshold: {THRESHOLD} # of confidence; 1.0 commits one token a step, lower ones are faster\n"
    )


def commands(block_size: int) -> dict[str, str]:
    """Return the command that starts each server; FOLDER stands for the export's folder."""
    return {
        "SGLang": (
            "python -m sglang.launch_server --model-path FOLDER --trust-remote-code \\\n"
            f"  --dllm-algorithm LowConfidence --dllm-algorithm-config FOLDER/{SERVER_FILE} \\\n"
            "  --max-running-requests 16 --port 30000"
        ),
        "LMDeploy": (
            "lmdeploy serve api_server FOLDER --backend pytorch --trust-remote-code --dtype bfloat16 \\\n"
            f"  --dllm-block-length {block_size} --dllm-unmasking-strategy low_confidence_dynamic \\\n"
            f"  --dllm-confidence-threshold {THRESHOLD} --server-port 23333"
        ),
    }


def mask_warning(form: ExportFormat, student: TrainedStudent) -> str | None:
    """Say that servers cannot fill this student's masks; None: they can."""
    mask_id = student.tokenizer.mask_id
    if form.mask_id is None or form.mask_id == mask_id:
        return None
    return (
        f"SGLang and LMDeploy assume mask token {form.mask_id} for this architecture; this student's is "
        f"{mask_id}, so they cannot serve it. Engines that read `mask_token_id` of config.json can."
    )


def serving_page(form: ExportFormat, student: TrainedStudent, block_size: int) -> str:
    """Return SERVING.md of an export that serves blocks."""
    warning = mask_warning(form, student)
    started = commands(block_size)
    sections = [
        "# Serving this student",
        *([f"**{warning}**"] if warning else []),
        f"`FOLDER` is this folder. Blocks have {block_size} tokens, as in training: with another "
        "length a server writes bad text and says nothing.",
        f"## SGLang ({READ_IN['SGLang']})",
        _code(started["SGLang"]),
        f"`{SERVER_FILE}` holds block size and confidence threshold. `--max-running-requests` is 1 unless it "
        "is given. `--tp-size` cuts the model; pipelines are refused.",
        f"## LMDeploy ({READ_IN['LMDeploy']})",
        _code(started["LMDeploy"]),
        "Without `--dllm-block-length` it takes blocks of 4; it reads no file of options. Weights in fp32 "
        "are computed in fp16 unless `--dtype` says otherwise. `--tp` cuts the model. Releases before 0.13 "
        "have no `--trust-remote-code`: leave it out there.",
        "## A request",
        "Both speak OpenAI's protocol and use the chat template of this folder:",
        _code(
            "curl http://127.0.0.1:30000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            '  -d \'{"model": "default", "max_tokens": 256, "temperature": 0, '
            '"messages": [{"role": "user", "content": "Return the sum of two numbers."}]}\''
        ),
        "LMDeploy listens on port 23333; `/v1/models` there says the name for `model`.",
        "## What differs from `tide sample`",
        "- Both commit every token of a block whose confidence exceeds a threshold, at least one a step. One "
        "token a step, as in the paper's tables, is `threshold: 1.0` for SGLang and "
        "`--dllm-unmasking-strategy low_confidence_static` for LMDeploy.\n"
        "- Both count blocks from the first token of the prompt, as training does. Neither forbids a model "
        "to predict the mask token itself; `tide sample` does.\n"
        "- Neither server was run on this folder by whoever exported it: names, sizes and keys were compared "
        "with their sources.",
    ]
    return "\n\n".join(sections) + "\n"


def _code(text: str) -> str:
    return f"```\n{text}\n```"
