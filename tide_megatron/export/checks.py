"""An export read back by those who will read it: each check returns what it found or refuses the export."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tide_megatron.base.errors import CheckpointError
from tide_megatron.export import configuration_sdar
from tide_megatron.export.flavours import Flavour
from tide_megatron.export.student import Student
from tide_megatron.export.weights import read_weights
from tide_megatron.models.folder import CONFIG_FILE, HfFolder
from tide_megatron.models.shards import Plan
from tide_megatron.text.backends.files import TOKENIZER_FILE
from tide_megatron.text.tokenizer import Tokenizer

TOLERANCE = 1e-5
"""Largest difference of two fp32 logits, relative to the largest logit where that is above 1."""
_CHAT = [{"role": "user", "content": "Return the sum of two numbers."}]
_AGAIN = "the export is not kept: export again, and report it if it happens twice"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was verified about an export."""

    flavour: str
    what: str
    found: str
    is_fine: bool = True
    """False: true and worth knowing, but somebody will not be able to use the export as it is."""


def check_tensors(folder: Path, flavour: Flavour, student: Student, source: HfFolder, plan: Plan) -> Check:
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
        for name, tensor in read_weights(flavour, student.architecture, source, plan):
            again = written.read(name)
            if again.dtype != tensor.dtype or not _same_bits(again, tensor):
                raise CheckpointError(f"{folder}: {name} came back different; {_AGAIN}")
    return Check(flavour=flavour.name, what="tensors", found=f"all {len(plan)} equal bit for bit")


def check_logits(
    flavour: Flavour, reader: str, expected: Tensor, found: Tensor, *, is_exact: bool = True
) -> Check:
    """Compare logits of two readers.

    Args:
        flavour: the form.
        reader: who computed `found`, and what is compared.
        expected: [tokens, vocabulary] fp32.
        found: of the same shape.
        is_exact: False: weights were rounded, so a difference is told and not judged.

    Raises:
        CheckpointError: they differ by more than TOLERANCE, or are not finite.
    """
    difference = float((expected - found).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if is_exact and not difference <= allowed:
        raise CheckpointError(
            f"{flavour.name}: logits by {reader} differ by {difference:.3g}, not at most {allowed:.3g}; "
            f"{_AGAIN}"
        )
    rounded = "" if is_exact else " (weights were rounded)"
    return Check(flavour=flavour.name, what="logits", found=f"{reader}: within {difference:.2g}{rounded}")


def check_contract(folder: Path, flavour: Flavour, student: Student) -> list[Check]:
    """Read config.json through its reader's class, and compare tensor names and shapes with Qwen3's modules.

    Raises:
        CheckpointError: naming what differs.
    """
    import transformers

    told = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    shipped = folder / Path(configuration_sdar.__file__).name
    kind = _config_class(shipped) if shipped.exists() else transformers.Qwen3Config
    config = kind.from_dict(told)
    shape = student.architecture
    wanted = {
        "architectures": [flavour.architecture],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.query_groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.feed_forward,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.epsilon,
        "tie_word_embeddings": shape.tied and not flavour.unties,
        "eos_token_id": student.special["eos"],
    }
    if flavour.serves_blocks:
        wanted |= {"mask_token_id": student.special["mask"], "block_size": student.block_size}
    _compare(f"{folder}: {CONFIG_FILE}", wanted, {key: getattr(config, key, None) for key in wanted})
    _compare(f"{folder}: {CONFIG_FILE}", {"model_type": flavour.model_type}, told)
    with torch.device("meta"):
        modules = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_qwen3(told))).state_dict()
    if config.tie_word_embeddings:
        modules.pop("lm_head.weight")
    with HfFolder(folder) as written:
        _compare(f"{folder}: tensors", {n: tuple(t.shape) for n, t in modules.items()}, written.shapes)
    found = f"{kind.__name__} reads config.json; names and shapes are Qwen3's"
    checks = [Check(flavour=flavour.name, what="contract", found=found)]
    if flavour.mask_id is not None:
        checks.append(_check_mask(flavour, student))
    return checks


def check_tokenizer(folder: Path, flavour: Flavour, student: Student) -> Check:
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
        return Check(flavour=flavour.name, what="tokenizer", found=said, is_fine=False)
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
        return Check(flavour=flavour.name, what="tokenizer", found=found, is_fine=False)
    prompt = theirs.apply_chat_template(
        _CHAT, tokenize=False, add_generation_prompt=True, **ours.chat.variables
    )
    wanted = {"prompt": ours.chat.render(_CHAT, add_generation_prompt=True)}
    _compare(f"{folder}: chat template by transformers", wanted, {"prompt": prompt})
    found = "transformers reads the same ids and renders the same chat"
    return Check(flavour=flavour.name, what="tokenizer", found=found)


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


def _check_mask(flavour: Flavour, student: Student) -> Check:
    is_theirs = student.special["mask"] == flavour.mask_id
    found = f"mask {student.special['mask']}, blocks of {student.block_size}: "
    found += (
        "as SGLang and LMDeploy have it" if is_theirs else f"SGLang and LMDeploy assume {flavour.mask_id}"
    )
    return Check(flavour=flavour.name, what="servers", found=found, is_fine=is_theirs)


def _config_class(file: Path) -> Any:
    """Import the configuration class that an export ships, from the export."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, f"{file} is Python"
    assert spec.loader is not None, f"{file} is Python"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SDARConfig


def _qwen3(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's facts without those that name a class."""
    return {
        key: value for key, value in told.items() if key not in ("model_type", "architectures", "auto_map")
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
