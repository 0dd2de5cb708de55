"""Which engine computes a frozen model in FP8, and what it asks of a device and of widths.

| recipe | `scaled` | `te` | `emulated` |
|---|---|---|---|
| `rowwise` | linears by `torch._scaled_mm`, experts grouped on sm_90, sm_100 | no such recipe | yes |
| `blockwise` | torch groups no products of blocks | `Float8BlockScaling` | yes |
| `tensorwise` | linears by `torch._scaled_mm`, experts one by one | `Float8CurrentScaling` | yes |

The recipe is mathematics and is never replaced; the engine is a choice of machine. `emulated` runs anywhere,
and only where it is asked for on a GPU: it is slower there than bf16.
"""

from __future__ import annotations

from tide_megatron.base.device import Device
from tide_megatron.base.errors import ConfigError, some_of
from tide_megatron.base.transformer_engine import TransformerEngine, find_transformer_engine
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.engine import Engine, against_te
from tide_megatron.models.params import is_quantized, local_params
from tide_megatron.models.precision import Fp8Options, Precision
from tide_megatron.models.shard import Shard
from tide_megatron.parallel.layout import Layout

_RECIPES = {"scaled": ("rowwise", "tensorwise"), "te": ("blockwise", "tensorwise")}
_WANT = {"scaled": "rowwise or tensorwise", "te": "blockwise or tensorwise"}


def choose_engine(wanted: str, fp8: Fp8Options | None, precision: Precision, device: Device) -> Engine:
    """Return what computes a model's layers: `Engine.on` without FP8, else `fp8_engine`.

    Raises:
        ConfigError: see there.
    """
    if fp8 is not None:
        return fp8_engine(wanted, fp8, precision, device)
    return Engine.on(wanted, precision, device)


def fp8_engine(
    wanted: str,
    fp8: Fp8Options,
    precision: Precision,
    device: Device,
    library: TransformerEngine | None = None,
) -> Engine:
    """Return the engine that a recipe's word means for a frozen model in FP8.

    Args:
        wanted: `auto` or an engine's name.
        fp8: the model's.
        precision: of what is not quantised.
        device: the model's.
        library: see `Engine.on`.

    Raises:
        ConfigError: an engine without this recipe, or one that cannot run here; begins with the key.
    """
    if wanted == "local":
        raise ConfigError("engine: 'local' has no FP8 layers; use engine=auto, or leave fp8 out")
    if wanted in _RECIPES and fp8.recipe not in _RECIPES[wanted]:
        raise ConfigError(
            f"fp8.recipe: {fp8.recipe!r} is not one of engine {wanted!r}; use {_WANT[wanted]}, or engine=auto"
        )
    if wanted == "emulated":
        return Engine(name="emulated", why="as asked")
    if device.type == "cpu":
        if wanted == "auto":
            return Engine(name="emulated", why="on the CPU it is the one for every recipe")
        return (
            Engine(name="scaled", why="as asked")
            if wanted == "scaled"
            else Engine.on("te", precision, device)
        )
    if not device.has_fp8:
        raise ConfigError(
            f"fp8: needs a GPU of sm_89 or newer, and this run has {device.described}; leave it out"
        )
    if precision.name != "bf16":
        raise ConfigError(
            f"fp8: FP8 products on CUDA come out in bf16, and precision is {precision.name!r}; use "
            "precision=bf16, or engine=emulated to test"
        )
    if wanted == "te":
        return Engine.on("te", precision, device, library)
    if wanted == "scaled" or fp8.recipe != "blockwise":
        return Engine(name="scaled", why=f"torch._scaled_mm, {fp8.recipe}")
    library = library or find_transformer_engine()
    fault = against_te(precision, device, library)
    if fault:
        raise ConfigError(
            f"fp8.recipe: 'blockwise' needs Transformer Engine here, and: {fault}; use rowwise, or "
            "engine=emulated to test"
        )
    return Engine(name="te", why=str(library))


def check_fp8(
    fp8: Fp8Options, engine: Engine, device: Device, architecture: Architecture, layout: Layout
) -> None:
    """Refuse what a model's shapes do not allow, before any weight is read. The layout is checked.

    Raises:
        ConfigError: nothing is left to quantise, or widths that the engine's kernels do not take.
    """
    layers = architecture.layers
    if not any(fp8.quantizes(layer, layers) for layer in range(layers)):
        raise ConfigError(
            f"fp8.first_layers: {fp8.first_layers} and fp8.last_layers: {fp8.last_layers} leave none of "
            f"{layers} layers to quantise; use less, or leave fp8 out"
        )
    most = layers // layout.pipeline
    if engine.name == "te" and max(fp8.first_layers, fp8.last_layers) > most:
        raise ConfigError(
            f"fp8.first_layers: {fp8.first_layers}, fp8.last_layers: {fp8.last_layers}: engine 'te' leaves "
            f"out the {most} layers of one pipeline stage at most, at either end; use less"
        )
    if device.type != "cuda" or engine.name == "emulated":  # blocks at an edge are smaller there
        return
    unit = 128 if fp8.recipe == "blockwise" else 16
    shard = Shard(
        tensor_size=layout.tensor, expert_tensor_size=layout.expert_tensor, num_layers=architecture.layers
    )
    odd: dict[tuple[int, ...], str] = {}
    for name, mapping in local_params(architecture, shard):
        if is_quantized(mapping, architecture, fp8) and any(size % unit for size in mapping.joined_shape):
            odd.setdefault(mapping.joined_shape, name)
    if odd:
        told = some_of([f"{name} {list(shape)}" for shape, name in odd.items()])
        raise ConfigError(
            f"fp8.recipe: {fp8.recipe!r} on engine {engine.name!r} takes multiples of {unit}, and a rank "
            f"holds {told}; use another recipe or layout, or leave fp8 out"
        )
