"""An export read back by those who will read it: each check returns what it found or refuses the export.

Logits are compared on a short text with every third token masked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.base.errors import CheckpointError
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import View, view_of_parts
from tide_megatron.export import configuration_sdar
from tide_megatron.export.formats import ExportFormat
from tide_megatron.export.student import TrainedStudent
from tide_megatron.models.build import build_model
from tide_megatron.models.hf.config import CONFIG_FILE
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.hf.safetensors import Plan
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import load_model, read_architecture
from tide_megatron.text.backends.files import TOKENIZER_FILE
from tide_megatron.text.rendering import CLOCK
from tide_megatron.text.tokenizer import Tokenizer

TOLERANCE = 1e-5
"""Largest difference of two fp32 logits, relative to the largest logit where that is above 1."""
TEXT = "def total(values):\n    return sum(values)  # the sum of all values, 0 where there are none\n"
MOST_TOKENS = 24
CAUSAL = Context(kind="block_causal", block_size=1)
"""Blocks of one token: what an ordinary decoder reads."""
_CHAT = [{"role": "user", "content": "Return the sum of two numbers."}]
_AGAIN = "the export is not kept: export again, and report it if it happens twice"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was verified about an export."""

    form: str
    what: str
    found: str
    is_fine: bool = True
    """False: true and worth knowing, but somebody will not be able to use the export as it is."""


def checks_table(checks: Sequence[Check]) -> Table:
    """Lay checks out, one a row; those that will keep somebody from using the export say `note`."""
    table = Table("form", "verified", "", "found", box=None)
    for check in checks:
        outcome = "[green]ok[/]" if check.is_fine else "[yellow]note[/]"
        table.add_row(check.form, check.what, outcome, escape(check.found))
    return table


def probe_ids(tokenizer: Tokenizer) -> Tensor:
    """Return the text's first ids with every third one masked, [1, tokens] int64."""
    ids = torch.tensor([tokenizer.encode(TEXT)[:MOST_TOKENS]])
    ids[:, ::3] = tokenizer.mask_id
    return ids


def probe_view(ids: Tensor, context: Context) -> View:
    """Show the ids in a context, all positions asked for; a clean copy is the same ids."""
    copies = ids.repeat(1, context.parts)
    return view_of_parts(copies, context, None, torch.arange(ids.shape[1], device=ids.device))


@torch.no_grad()
def answers(
    folder: Path, ids: Tensor, contexts: list[Context], groups: ProcessGroupCollection, device: Device
) -> list[Tensor]:
    """Load a folder with our reader and return its logits in each context, [tokens, vocabulary] fp32 on CPU.

    Not a collective, but the process world must have been joined.
    """
    options = ModelOptions(device=device, precision=Precision("fp32"))
    model = build_model(read_architecture(folder), groups, options)
    load_model(model, folder)
    ids = ids.to(device.torch_device)
    return [(model.rows(probe_view(ids, context)) @ model.head_weight.T).cpu() for context in contexts]


def check_tensors(
    folder: Path, form: ExportFormat, student: TrainedStudent, source: HfFolder, plan: Plan
) -> Check:
    """Compare all tensors, read back, with the student's, bit for bit, one at a time.

    Raises:
        CheckpointError: naming the first that differs.
    """
    with HfFolder(folder) as written:
        if written.shapes.keys() != plan.keys():
            raise CheckpointError(
                f"{folder}: holds other tensors than were planned: "
                f"{sorted(written.shapes.keys() ^ plan.keys())[:5]}; {_AGAIN}"
            )
        for name, tensor in form.read(student.architecture, source, plan):
            again = written.read(name)
            if again.dtype != tensor.dtype or not _same_bits(again, tensor):
                raise CheckpointError(f"{folder}: {name} came back different; {_AGAIN}")
    return Check(form=form.name, what="tensors", found=f"all {len(plan)} equal bit for bit")


def check_logits(
    form: ExportFormat, reader: str, expected: Tensor, found: Tensor, *, is_exact: bool = True
) -> Check:
    """Compare logits of two readers.

    Args:
        form: the form.
        reader: who computed `found`, and what is compared.
        expected: [tokens, vocabulary] fp32.
        found: of the same shape.
        is_exact: False: weights were rounded, so a difference is reported and not judged.

    Raises:
        CheckpointError: they differ by more than TOLERANCE, or are not finite.
    """
    difference = float((expected - found).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if is_exact and not difference <= allowed:
        raise CheckpointError(
            f"{form.name}: logits by {reader} differ by {difference:.3g}, not at most {allowed:.3g}; {_AGAIN}"
        )
    rounded = "" if is_exact else " (weights were rounded)"
    return Check(form=form.name, what="logits", found=f"{reader}: within {difference:.2g}{rounded}")


def check_contract(folder: Path, form: ExportFormat, student: TrainedStudent) -> list[Check]:
    """Read config.json through its reader's class, and compare tensor names and shapes with Qwen3's modules.

    Raises:
        CheckpointError: naming what differs.
    """
    import transformers

    written_config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    shipped = folder / Path(configuration_sdar.__file__).name
    kind = _config_class(shipped) if shipped.exists() else transformers.Qwen3Config
    config = kind.from_dict(written_config)
    shape = student.architecture
    wanted = {
        "architectures": [form.architecture],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.query_groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.feed_forward,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.epsilon,
        "tie_word_embeddings": shape.tied and not form.unties,
        "eos_token_id": student.special["eos"],
    }
    if form.serves_blocks:
        wanted |= {
            "mask_token_id": student.special["mask"],
            "block_size": student.block_size,
            "rope_theta": shape.rotary_base,
        }
    _compare(f"{folder}: {CONFIG_FILE}", wanted, {key: getattr(config, key, None) for key in wanted})
    _compare(f"{folder}: {CONFIG_FILE}", {"model_type": form.model_type}, written_config)
    with torch.device("meta"):
        modules = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**_without_classes(written_config))
        ).state_dict()
    if config.tie_word_embeddings:
        modules.pop("lm_head.weight")
    with HfFolder(folder) as written:
        _compare(f"{folder}: tensors", {n: tuple(t.shape) for n, t in modules.items()}, written.shapes)
    found = f"{kind.__name__} reads config.json; names and shapes are Qwen3's"
    checks = [Check(form=form.name, what="contract", found=found)]
    if form.mask_id is not None:
        checks.append(_check_mask(form, student))
    return checks


def check_tokenizer(folder: Path, form: ExportFormat, student: TrainedStudent) -> Check:
    """Let transformers read the tokenizer: the same ids, special tokens whole, and the same chat prompt.

    Raises:
        CheckpointError: it reads something else.
    """
    import transformers

    ours = Tokenizer.load(folder, mask=student.tokenizer.special_tokens["mask_token"])
    if ours.digest != student.tokenizer.digest:
        raise CheckpointError(f"{folder}: the tokenizer came back different; {_AGAIN}")
    if not (folder / TOKENIZER_FILE).is_file():
        said = f"read back by us; transformers would need {TOKENIZER_FILE}"
        return Check(form=form.name, what="tokenizer", found=said, is_fine=False)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    names = ("mask_token", "eos_token", "pad_token")
    text = "Größe = 3\n" + " x ".join(ours.special_tokens[name] for name in names)
    _compare(
        f"{folder}: tokenizer by transformers",
        {"ids": ours.encode(text), **{name: ours.special_tokens[name] for name in names}},
        {
            "ids": theirs(text, add_special_tokens=False)["input_ids"],
            **{name: str(getattr(theirs, name)) for name in names},
        },
    )
    if ours.chat is None:
        found = "transformers reads the same ids; there is no chat template"
        return Check(form=form.name, what="tokenizer", found=found, is_fine=False)
    if CLOCK in ours.chat.variables:
        found = "transformers reads the same ids; its chats have today's date, ours the date of training"
        return Check(form=form.name, what="tokenizer", found=found, is_fine=False)
    prompt = theirs.apply_chat_template(
        _CHAT, tokenize=False, add_generation_prompt=True, **ours.chat.variables
    )
    wanted = {"prompt": ours.chat.render(_CHAT, add_generation_prompt=True)}
    _compare(f"{folder}: chat template by transformers", wanted, {"prompt": prompt})
    found = "transformers reads the same ids and renders the same chat"
    return Check(form=form.name, what="tokenizer", found=found)


@torch.no_grad()
def transformers_logits(folder: Path, ids: Tensor) -> Tensor:
    """Return the logits of transformers' own causal Qwen3, [tokens, vocabulary] fp32, computed on CPU."""
    import transformers

    with _without_bars(transformers.utils.logging):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
        )
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits[0].float()


@contextlib.contextmanager
def _without_bars(library: Any) -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    was_shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            library.enable_progress_bar()


def _check_mask(form: ExportFormat, student: TrainedStudent) -> Check:
    is_theirs = student.special["mask"] == form.mask_id
    found = f"mask {student.special['mask']}, blocks of {student.block_size}: "
    found += "as SGLang and LMDeploy have it" if is_theirs else f"SGLang and LMDeploy assume {form.mask_id}"
    return Check(form=form.name, what="servers", found=found, is_fine=is_theirs)


def _config_class(file: Path) -> Any:
    """Import the configuration class that an export ships, from the export."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, f"{file} is Python"
    assert spec.loader is not None, f"{file} is Python"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SDARConfig


def _without_classes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's keys but for those that name a class."""
    return {
        key: value for key, value in config.items() if key not in ("model_type", "architectures", "auto_map")
    }


def _compare(what: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse the export where a reader finds another value under a name."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{what}: {name} is read as {found.get(name)!r}, written was {value!r}; {_AGAIN}"
            )


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Compare bits: NaN equals itself, and zeros have signs."""
    return left.shape == right.shape and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )
