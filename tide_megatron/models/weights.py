"""Weights in and out: from a Hugging Face folder into this rank's part, back into a folder, or fresh.

Every rank reads the headers of a folder (names and shapes of all tensors, so all ranks refuse alike) and then
only the rows and columns it holds: nobody ever has the whole model. Missing, unknown and misshapen
tensors are named together in one message. Only safetensors: no pickle is read or written.

Fresh weights are drawn per Hugging Face tensor from (seed, its name), through the same mapping as loading:
an expert gets the same values wherever it lives, and a cut matrix is a cut of the same whole, so 1 rank and
4 ranks start from the same model.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tide_megatron.base.device import node_share
from tide_megatron.base.errors import CheckpointError, ConfigError, nearest, some_of
from tide_megatron.base.files import refuse_damaged
from tide_megatron.models.arch import ARCHITECTURES
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.build import TideModel, is_extra_state
from tide_megatron.models.hf.config import read_config, with_dtype
from tide_megatron.models.hf.folder import HfFolder, stream_folder
from tide_megatron.models.hf.safetensors import TensorSpec
from tide_megatron.models.hf.values import shown
from tide_megatron.models.mapping import ParamMapping
from tide_megatron.models.params import hf_shapes, local_params, param_mappings
from tide_megatron.models.quantized import QuantizedLinear
from tide_megatron.models.verify import ZeroWatch, refuse_other_head, warn_of_doubts
from tide_megatron.parallel.collectives import own_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What filling a model took, on this rank."""

    parameters: int
    """Elements of all parameters this rank holds."""
    tensors_read: int
    bytes_read: int
    """Bytes of tensors read from disk, as stored; headers not counted."""


def read_architecture(folder: Path) -> Architecture:
    """Read what a model folder holds from its config.json.

    Raises:
        CheckpointError: no folder, or no readable config.json.
        ConfigError: a model type or switch that is not implemented; the message names folder and key.
    """
    config = read_config(folder)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        hint = nearest(str(model_type), ARCHITECTURES)
        raise ConfigError(f"{folder}: config.json: model_type: {shown(model_type)} is not supported; {hint}")
    try:
        return ARCHITECTURES[model_type].from_hf(config)
    except ConfigError as fault:
        raise ConfigError(f"{folder}: {fault}") from None


def load_model(
    model: TideModel, folder: Path, *, verify: bool = True, mask_id: int | None = None
) -> LoadReport:
    """Fill a model from a Hugging Face folder, casting to the model's dtypes.

    Not a collective: each rank reads for itself. With several ranks, wrap the call in
    `parallel.collectives.fail_together`, because a disk may fail one of them.

    Args:
        model: with its dtypes.
        folder: config.json and safetensors.
        verify: where the folder has digests of its weights (`base.digests`), compare them first; the ranks
            share the files out.
        mask_id: id of the mask token; None: what config.json says, if it does.

    Raises:
        CheckpointError: with all missing, unknown and misshapen tensors, or the files that are damaged, or a
            tied head that is not the embedding.
    """
    architecture = model.architecture
    with HfFolder(folder) as source:
        check_names(architecture, source)
        if verify:
            refuse_damaged(folder, own_share())
        refuse_other_head(architecture, source, own_share())
        zeros, merged = ZeroWatch(), architecture.has_merged(source.shapes)
        pieces = local_params(architecture, model.shard, merged=merged, spelling=model.spelling)
        reads = [(name, piece.part(name)) for _, piece in pieces for name in piece.sources]
        source.read_ahead(reads, node_share())
        tensors_read = _fill(model, lambda mapping: zeros.read(source, mapping), merged=merged)
        warn_of_doubts(architecture, source, zeros, mask_id)
        return _report(model, tensors_read, source.bytes_read)


@torch.no_grad()
def draw_weights(model: TideModel, seed: int) -> LoadReport:
    """Fill a model with fresh weights that depend on the seed and each tensor's name, not on ranks or layout.

    Matrices are normal with the architecture's `initializer_range`, norms one, biases zero. Not a collective.
    """
    deviation = model.architecture.initializer_range

    def draw(mapping: ParamMapping) -> list[Tensor]:
        if mapping.fill is not None:
            return [torch.full(shape, mapping.fill) for shape in mapping.shapes.values()]
        drawn = {name: _normal(seed, name, shape) * deviation for name, shape in mapping.sources.items()}
        return [
            mapping.parts[name].take(whole) if name in mapping.parts else whole
            for name, whole in drawn.items()
        ]

    _fill(model, draw)
    return _report(model, 0, 0)


def save_model(
    model: TideModel, folder: Path, *, dtype: torch.dtype | None = None, files: Iterable[Path] = ()
) -> None:
    """Write a model as a Hugging Face folder: config.json, model.safetensors, and `files` beside them.

    Every rank must call it; the experts of rank 0's expert group travel to rank 0, which alone writes. Other
    ranks return early, so a caller that reads the folder next puts a barrier between.

    Args:
        model: trainable or frozen, cut over expert ranks only; its weights are not touched.
        folder: where it shall stand; an older one is replaced as a whole, at once.
        dtype: stored dtype of parameters; None keeps each tensor's own. The router bias stays fp32.
        files: files to copy into the folder (the tokenizer's).

    Raises:
        CheckpointError: on rank 0, when the disk refuses.
    """
    assert model.shard.is_uncut, "only models cut over expert ranks alone are written"
    assert not any(isinstance(part, QuantizedLinear) for part in model.modules()), "8 bits lack their scales"
    if 0 not in dist.get_process_group_ranks(model.groups.ep):
        return
    tensors = _gather(model, dtype)
    try:
        if dist.get_rank() == 0:
            stored = str(dtype or model.config.params_dtype).removeprefix("torch.")
            config = with_dtype(model.architecture.to_hf(), stored)
            stream_folder(folder, config, _plan(model, dtype), tensors, files)
    finally:
        for _ in tensors:  # other ranks send theirs, and this one takes them in although its disk refused
            pass


def hf_tensors(model: TideModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give this rank's tensors (weights or gradients, by our names) Hugging Face's names and shapes."""
    renamed: dict[str, Tensor] = {}
    for name, mapping in local_params(model.architecture, model.shard, spelling=model.spelling):
        if name in tensors:
            assert not mapping.parts, f"{name} is a part of {list(mapping.sources)}, which has no name there"
            renamed |= zip(mapping.sources, mapping.split(tensors[name]), strict=True)
    return renamed


def _own_tensors(model: TideModel) -> dict[str, Tensor]:
    """Return every tensor of a model that a checkpoint must hold, by name."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not is_extra_state(name)
    }


@torch.no_grad()
def _fill(model: TideModel, parts: Callable[[ParamMapping], list[Tensor]], *, merged: bool = False) -> int:
    """Copy every tensor this rank holds into its place; return how many Hugging Face tensors were given.

    Args:
        model: filled.
        parts: gives this rank's parts of the Hugging Face tensors that a mapping joins.
        merged: see `param_mappings`.
    """
    own, num_tensors = _own_tensors(model), 0
    for name, mapping in local_params(
        model.architecture, model.shard, merged=merged, spelling=model.spelling
    ):
        given = parts(mapping)
        num_tensors += len(given)
        _place(model, name, own.pop(name), mapping.join(given))
    assert not own, f"the weight table of {type(model.architecture).__name__} forgets {sorted(own)}"
    return num_tensors


def _place(model: TideModel, name: str, room: Tensor, values: Tensor) -> None:
    """Copy a tensor into its place, in the dtype that is kept there; a quantised layer makes 8 bits of it."""
    layer = model.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, QuantizedLinear) and name.endswith(".weight"):
        layer.store(values)
    else:
        room.copy_(values)


def _report(model: TideModel, tensors_read: int, bytes_read: int) -> LoadReport:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return LoadReport(parameters=parameters, tensors_read=tensors_read, bytes_read=bytes_read)


def check_folder_names(folder: Path, architecture: Architecture) -> None:
    """Compare the headers of a folder's weights with a model's table; no weight is read.

    Raises:
        CheckpointError: with all missing, unknown and misshapen tensors, or the file that is damaged.
    """
    with HfFolder(folder) as source:
        check_names(architecture, source)


def check_names(architecture: Architecture, source: HfFolder) -> None:
    """Compare a folder's headers with the whole model's table, experts apart or stacked as it has them.

    Raises:
        CheckpointError: with all missing, unknown and misshapen tensors, and those that are no numbers with
            fractions.
    """
    found = source.shapes
    wanted = hf_shapes(architecture, merged=architecture.has_merged(found))
    shapes = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted and not architecture.ignores(name)],
        "misshapen": shapes,
        "of whole numbers": [
            f"{name} {source.dtype(name)}"
            for name in wanted
            if name in found and not source.dtype(name).is_floating_point
        ],
    }
    lines = [listed(kind, names) for kind, names in faults.items() if names]
    if lines:
        raise CheckpointError(
            f"{source.folder}: the weights do not fit config.json (model_type {architecture.model_type}):\n"
            + "\n".join(lines)
            + "\ncheck that both come from the same model"
        )


def listed(kind: str, names: Sequence[str]) -> str:
    """Write a line of a message: how many tensors have a fault, and the first of them."""
    return f"  {len(names)} {kind}: {some_of(names)}"


def _normal(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw a standard normal tensor that depends on seed and name alone, on CPU in fp32."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(shape, generator=generator)


def _plan(model: TideModel, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """Return what `_gather` will yield."""
    own = _own_tensors(model)
    plan: dict[str, TensorSpec] = {}
    for mapping in param_mappings(model.architecture, spelling=model.spelling):
        name = mapping.local_name(model.shard, model.architecture.num_experts)
        here = model.head_weight.dtype if name is None else own[name].dtype
        plan |= {
            source: TensorSpec(shape, _kept(mapping, here, dtype))
            for source, shape in mapping.sources.items()
        }
    return plan


def _gather(model: TideModel, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the whole model's Hugging Face tensors on the expert group's first rank; nothing elsewhere.

    Every rank of the expert group must exhaust it: owners send their experts in the table's order.
    """
    own, shard, group = _own_tensors(model), model.shard, model.groups.ep
    for mapping in param_mappings(model.architecture, spelling=model.spelling):
        name = mapping.local_name(shard, model.architecture.num_experts)
        if shard.expert_rank == 0:
            if name is None:
                assert mapping.expert is not None, f"{mapping.target} is held by every rank"
                owner = shard.expert_owner(mapping.expert, model.architecture.num_experts)
                tensor = model.head_weight.new_empty(mapping.joined_shape)
                dist.recv(tensor, src=dist.get_global_rank(group, owner), group=group)
            else:
                tensor = own[name].detach()
            kept = _kept(mapping, tensor.dtype, dtype)
            for source, part in zip(mapping.sources, mapping.split(tensor), strict=True):
                yield source, part.to(kept)
        elif name is not None and mapping.expert is not None:
            sent = own[name].detach().contiguous()
            dist.send(sent, dst=dist.get_global_rank(group, 0), group=group)


def _kept(mapping: ParamMapping, held: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype a tensor is stored in; buffers keep theirs."""
    return held if dtype is None or not mapping.is_parameter else dtype
