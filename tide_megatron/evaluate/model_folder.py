"""A model folder as evaluation opens it: the context that it was trained in, and the model itself.

The context is written beside the weights, for no Hugging Face config has a key for it. Whoever reads the
model without it must name the context, because a wrong one does not crash: it writes bad text.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from tide_megatron.base.device import Device
from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.base.read import json_of
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.options import Arithmetic
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.fp8_engine import check_fp8, choose_engine
from tide_megatron.models.hf.config import CONFIG_FILE, read_config
from tide_megatron.models.precision import Precision, numbers
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import load_model, read_architecture
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

log = logging.getLogger(__name__)

CONTEXT_FILE = "tide_context.json"
RECIPE, MODEL = "recipe.yaml", "model"
"""What stands in a run's folder (`train.folder`): its recipe, and the student when it has ended."""


def model_of(path: Path) -> Path:
    """Return the model folder that a user means: this one, or the student's in a run's folder.

    Raises:
        CheckpointError: the run has no student yet.
    """
    if not (path / RECIPE).is_file() or (path / CONFIG_FILE).is_file():
        return path
    if not (path / MODEL / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path}: the run has no {MODEL}/ yet, which is written when it ends; go on with it by "
            f"tide train {path / RECIPE}, or give a model folder"
        )
    return path / MODEL


def write_context(folder: Path, context: Context) -> None:
    """Write a model folder's context."""
    text = json.dumps(dataclasses.asdict(context), indent=1)
    (folder / CONTEXT_FILE).write_text(text + "\n", encoding="utf-8")


def trained_context(folder: Path, kind: str | None = None, block_size: int | None = None) -> Context:
    """Return the context to read a model in: what was asked for, else what its folder says.

    Args:
        folder: the model's.
        kind: context kind; None: the folder's.
        block_size: tokens; None: the folder's.

    Raises:
        ConfigError: neither the caller nor the folder says it.
    """
    saved = _stored_context(Path(folder))
    kind, block_size = kind or saved.get("kind"), block_size or saved.get("block_size")
    if kind is None or (block_size is None and kind != "bidirectional"):
        raise ConfigError(
            f"{folder}: does not say what context it was trained in ({CONTEXT_FILE} is missing); "
            "give --context and --block-size"
        )
    return Context(kind=kind, block_size=block_size or 1)  # type: ignore[arg-type] # Context checks the word


def context_differences(folder: Path, context: Context) -> list[str]:
    """Say in what a context differs from the one that a model folder was trained in, as far as it says.

    Args:
        folder: the model's; what `write_context` left there counts, else the `block_size` of its config.json,
            which exports and the SDAR models have.
        context: what the model is to be read in.

    Raises:
        TideError: a file of the folder that is not readable.
    """
    saved = _stored_context(folder) or {"block_size": read_config(folder).get("block_size")}
    kind, size = saved.get("kind"), saved.get("block_size")
    found = []
    if kind is not None and kind != context.kind:
        found.append(f"context.kind is {context.kind}, it was trained {kind}")
    has_blocks = "bidirectional" not in (kind, context.kind)
    if has_blocks and isinstance(size, int) and size != context.block_size:
        found.append(f"context.block_size is {context.block_size}, it was trained with {size}")
    return found


def _stored_context(folder: Path) -> dict[str, Any]:
    """Return what `write_context` wrote into a folder; empty: nothing."""
    file = folder / CONTEXT_FILE
    try:
        said = json_of(file)
        if not isinstance(said, dict):
            raise ValueError(f"it holds a {type(said).__name__}")
        kind, size = said.get("kind"), said.get("block_size")
        if not isinstance(kind, str | None):
            raise ValueError(f"kind is {kind!r}")
        if isinstance(size, bool) or not isinstance(size, int | None):
            raise ValueError(f"block_size is {size!r}")
    except FileNotFoundError:
        return {}
    except ValueError as fault:
        raise ConfigError(
            f"{file}: not readable ({fault}); remove it, and give --context and --block-size"
        ) from None
    return said


def open_model(folder: Path, device: Device, arithmetic: Arithmetic | None = None) -> TideModel:
    """Build a frozen model whole on this rank and load it. All ranks of the world call it together.

    Args:
        folder: config.json and safetensors.
        device: where to.
        arithmetic: in what numbers, and by whose layers; None: as `auto` has it.

    Raises:
        TideError: numbers or layers that are not to be had here, or a folder that cannot be read.
    """
    wanted, layout, architecture = arithmetic or Arithmetic(), Layout(), read_architecture(folder)
    precision = Precision.on(wanted.precision, device)
    engine = choose_engine(wanted.engine, wanted.fp8, precision, device)
    if wanted.fp8 is not None:
        check_fp8(wanted.fp8, engine, device, architecture, layout)
    options = ModelOptions(device=device, layout=layout, precision=precision, engine=engine, fp8=wanted.fp8)
    model = build_model(architecture, make_groups(layout), options)
    load_model(model, folder)
    log.info("%s: %s, %s, %s", folder, architecture.model_type, numbers(precision, wanted.fp8), engine)
    return model
