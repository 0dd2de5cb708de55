"""The model card: what a student is, how it came about, what it scored, how to load it, what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tide_megatron import __version__
from tide_megatron.data.manifest import Manifest
from tide_megatron.export.formats import ExportFormat
from tide_megatron.export.serving import SERVER_FILE, SERVING_FILE, commands, mask_warning
from tide_megatron.export.student import TrainedStudent

CARD_FILE = "README.md"


def model_card(form: ExportFormat, student: TrainedStudent, parameters: int) -> str:
    """Return README.md of an export.

    Args:
        form: the form.
        student: with its story.
        parameters: elements of all tensors, a tied head once.
    """
    sections = {
        "What it is": _what(form, student, parameters),
        "How it was trained": _training(student),
        "Data": _data(student),
        "Held-out metrics": _metrics(student.result),
        "How to load it": _loading(form, student),
        "Limits": _limits(form, student),
    }
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["diffusion-language-model", "distillation", "tide", form.model_type],
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# A distilled diffusion student\n\n{body}\n"


def _what(form: ExportFormat, student: TrainedStudent, parameters: int) -> str:
    shape, context = student.architecture, student.context
    said = f"{context.kind}, blocks of {context.block_size} tokens" if context else "not recorded"
    if context and context.kind == "bidirectional":
        said = context.kind
    return (
        f"A language model of {parameters:,} parameters that fills masked tokens instead of guessing the "
        f"next one, trained with tide_megatron {__version__} and exported as `{form.architecture}` for "
        f"{form.readers}.\n\n"
        f"- layers {shape.layers}, hidden {shape.hidden}, heads {shape.heads} ({shape.query_groups} for keys "
        f"and values), vocabulary {shape.vocabulary:,}\n"
        f"- trained context: {said}\n"
        f"- mask token: `{student.tokenizer.special_tokens['mask_token']}`, id {student.tokenizer.mask_id}"
    )


def _training(student: TrainedStudent) -> str:
    if student.recipe is None:
        return "No run is known: the student was exported from a model folder."
    return f"The resolved recipe, whole:\n\n```yaml\n{yaml.safe_dump(student.recipe, sort_keys=False)}```"


def _data(student: TrainedStudent) -> str:
    named = (student.recipe or {}).get("data")
    if not isinstance(named, dict):
        return "Not recorded."
    lines = []
    for part in ("train", "held_out"):
        if named.get(part):
            manifest = student.data.get(part)
            described = _manifest(manifest) if manifest else "no longer at hand when this was exported"
            lines.append(f"- {part.replace('_', '-')} (`{Path(str(named[part])).name}`): {described}")
    return "\n".join(lines) or "Not recorded."


def _manifest(manifest: Manifest) -> str:
    counts = manifest.statistics
    return (
        f"{manifest.samples:,} samples, {counts.tokens:,} tokens ({counts.reply_tokens:,} of replies), at "
        f"most {manifest.max_length} a sample; manifest digest `{manifest.digest}`"
    )


def _metrics(result: Mapping[str, Any] | None) -> str:
    rows = list(_flat(result)) if result else []
    if not rows:
        return "None were recorded."
    lines = [f"| `{name}` | {value} |" for name, value in rows]
    return "\n".join(["| name | value |", "|---|---|", *lines])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every single value of a result, lists of samples left out."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | str):
            yield f"{prefix}{name}", str(value)
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.6g}"


def _loading(form: ExportFormat, student: TrainedStudent) -> str:
    blocks = student.block_size
    ours = "`tide sample FOLDER PROMPT` reads every form."
    if form.serves_blocks:
        assert blocks is not None, f"{form.name} goes out with a block size only"
        started = "\n".join(commands(blocks).values())
        return (
            f"```\n{started}\n```\n\n`{SERVING_FILE}` says what these read, and how their answers differ "
            f"from ours; `{SERVER_FILE}` holds the block size for SGLang. {ours}"
        )
    if form.model_type == "a2d-qwen3":
        size = f"{blocks}" if blocks else "THE TRAINED ONE"
        return (
            "```python\nimport dllm  # registers the model type\nimport transformers\n\n"
            'model = transformers.AutoModelForMaskedLM.from_pretrained("FOLDER", dtype="auto")\n'
            'tokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")\n```\n\n'
            f"Sample with its block sampler and `block_size={size}`. {ours}"
        )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n\n{ours}'
    )


def _limits(form: ExportFormat, student: TrainedStudent) -> str:
    lines = [
        "The licences of the base model, of the teachers and of the data hold for this student as well.",
        "Nothing was done to make its answers safe or true.",
    ]
    if form.model_type == "qwen3":
        lines.append(
            "Qwen3's own forward pass is causal and predicts the next token; this student learnt neither. "
            "Use this form to go on training it, or with a sampler that brings its own attention mask: "
            "`generate()` runs, and writes nonsense."
        )
    if student.context is None:
        lines.append("The context that it was trained in is not recorded; a wrong one writes bad text.")
    warning = mask_warning(form, student)
    if warning is not None:
        lines.append(warning)
    return "\n".join(f"- {line}" for line in lines)
