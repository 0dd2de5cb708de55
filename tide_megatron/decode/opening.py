"""A decoder from what a user names: a run, one of its checkpoints, an export, any model folder.

A run that has ended gives its student; one that has not, its newest checkpoint, and the log says which step
that is. A checkpoint knows its run's recipe, which says what the student is and in which context it reads.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from tide_megatron.base.device import Device
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import damage
from tide_megatron.checkpoint.load import load_checkpoint
from tide_megatron.checkpoint.metadata import STATE, CheckpointMetadata, read_metadata
from tide_megatron.checkpoint.retention import listed
from tide_megatron.decode.decoder import Decoder
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import (
    MODEL,
    RECIPE,
    model_of,
    open_model,
    trained_context,
)
from tide_megatron.evaluate.options import Arithmetic
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.fp8_engine import choose_engine
from tide_megatron.models.hf.config import CONFIG_FILE
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import read_architecture
from tide_megatron.parallel.collectives import fail_together, own_share
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a user named, read but for its weights."""

    place: Path
    """A model folder, or a checkpoint."""
    folder: Path
    """With config.json; of a checkpoint the one that its run began from."""
    tokenizer: Tokenizer
    context: Context

    def open(self, device: Device, arithmetic: Arithmetic | None = None) -> Decoder:
        """Open the model, whole on this rank. All ranks of the world call it together.

        Args:
            device: where to.
            arithmetic: in what numbers, and by whose layers; None: as `auto` has it.

        Raises:
            TideError: weights that do not fit or cannot be read.
        """
        if self.place == self.folder:
            model = open_model(self.folder, device, arithmetic)
        else:
            model = _open_checkpoint(self.place, self.folder, device, arithmetic or Arithmetic())
        return Decoder(model, self.tokenizer, self.context)


def open_decoder(
    place: Path,
    device: Device,
    arithmetic: Arithmetic | None = None,
    mask: str | None = None,
    context: Context | None = None,
) -> Decoder:
    """Open a model, whole on this rank: `find` and `Found.open`. All ranks of the world call it together."""
    return find(place, mask, context).open(device, arithmetic)


def find(place: Path, mask: str | None = None, context: Context | None = None) -> Found:
    """Read what a model is, and its tokenizer. No collective.

    Args:
        place: a run's folder, one of its checkpoints, or a model folder with a tokenizer.
        mask: the mask token it was trained with; None: what its recipe or folder says.
        context: in which it was trained; None: what its recipe or folder says.

    Raises:
        TideError: what is there cannot be read, or nobody says its context.
    """
    found = found_at(place)
    if not _is_checkpoint(found):
        tokenizer = Tokenizer.load(found, mask=mask)
        return Found(
            place=found, folder=found, tokenizer=tokenizer, context=context or trained_context(found)
        )
    metadata = read_metadata(found)
    student = _student_of(found, metadata)
    folder = Path(student["folder"])
    tokenizer = Tokenizer.load(
        folder,
        mask=mask or student.get("mask"),
        add_mask=student.get("add_mask", False),
        template=student.get("template"),
        chat_template_kwargs=student.get("chat_template_kwargs"),
    )
    log.info("%s: the student at step %d of %d", found, metadata.clock.step, metadata.clock.total_steps)
    return Found(
        place=found, folder=folder, tokenizer=tokenizer, context=context or Context(**student["context"])
    )


def found_at(place: Path) -> Path:
    """Return the model folder or the checkpoint that a user means.

    Raises:
        CheckpointError: a run that has written neither yet.
    """
    if (place / CONFIG_FILE).is_file() or _is_checkpoint(place):
        return place
    is_run = (place / RECIPE).is_file()
    if is_run and (place / MODEL / CONFIG_FILE).is_file():
        return place / MODEL
    checkpoints = listed(place / "checkpoints") if is_run else listed(place)
    return checkpoints[-1] if checkpoints else model_of(place)


def _is_checkpoint(place: Path) -> bool:
    is_named_so = (place / STATE).is_file() or place.name.startswith("step-")
    return is_named_so and not (place / CONFIG_FILE).is_file()


def _student_of(found: Path, metadata: CheckpointMetadata) -> dict[str, Any]:
    """Return what a checkpoint's recipe says of the student."""
    try:
        student: dict[str, Any] = dict(metadata.recipe["student"])
        folder = Path(student["folder"])
        Context(**student["context"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{found}: its recipe says no student; give the run's model/ instead") from None
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{found}: its recipe's student.folder is {folder}, where no {CONFIG_FILE} is; put the folder "
            "back, or run from the folder that the run was started in"
        )
    return student


def _open_checkpoint(found: Path, folder: Path, device: Device, arithmetic: Arithmetic) -> TideModel:
    """Build the student of a checkpoint, frozen, with the checkpoint's weights. All ranks do so together."""
    if arithmetic.fp8 is not None:
        raise CheckpointError(f"{found}: a checkpoint cannot be read in FP8; export it, and read the export")
    with fail_together():
        faults = damage(found, own_share())
        if faults:
            raise CheckpointError(f"{found} is not whole: {'; '.join(faults)}; choose another step-*")
    precision = Precision.on(arithmetic.precision, device)
    options = ModelOptions(
        device=device,
        precision=precision,
        engine=choose_engine(arithmetic.engine, None, precision, device),
        trainable=True,  # as it was written: with its final norm and head in their places
    )
    model = build_model(read_architecture(folder), make_groups(Layout()), options)
    load_checkpoint(found, model, None)
    model.requires_grad_(False)
    model.eval()
    return model
