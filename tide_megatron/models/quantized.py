"""Frozen linear and expert layers that hold 8 bits a weight, in the slots of megatron-core's own.

    hidden rows -> quantised in flight -> product with the weight at rest -> (sum over tensor ranks)

A layer holds its weight in e4m3 with fp32 scales and never in another format: `store` quantises what it is
given, tensor by tensor, as a model is loaded. Nothing here has a gradient. Two engines do the same
arithmetic: `emulated` multiplies the dequantised numbers in fp32, on any device; `scaled` calls torch's FP8
kernels. Each rank finds the scales of the part that it holds and of the rows that it is given.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import tide_megatron.platform

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tide_megatron.models.experts import FORMS, LoopedExperts, groups_of
from tide_megatron.models.fp8 import (
    DTYPES,
    SCALINGS,
    Quantized,
    Scaling,
    quantize,
    quantize_into,
    scale_shape,
)
from tide_megatron.models.spec import ModelOptions

Product = Callable[[Tensor, Quantized, Scaling], Tensor]
"""(rows [tokens, in], weight [out, in], who shares scales) -> [tokens, out] in the rows' dtype."""


def emulated_product(rows: Tensor, weight: Quantized, scaling: Scaling) -> Tensor:
    """Multiply as an FP8 kernel does: rounded factors, fp32 products and sums."""
    given = quantize(rows, scaling.inputs, is_power_of_two=scaling.is_power_of_two)
    return (given.dequantized() @ weight.dequantized().t()).to(rows.dtype)


def scaled_product(rows: Tensor, weight: Quantized, scaling: Scaling) -> Tensor:
    """Multiply by `torch._scaled_mm`: scales by row or by tensor.

    A CUDA kernel gives bf16, which `Engine.on` asks of the model; the CPU's gives fp32. Fast accumulation is
    off: on Hopper it would keep fewer bits of the sums than the emulation has.
    """
    given = quantize(rows, scaling.inputs)
    right = weight.data.t()
    if not len(rows):
        return rows.new_empty(0, len(weight.data))
    wide = rows.dtype if rows.is_cuda else torch.float32
    if weight.scale.numel() == 1:
        one, other = given.scale.reshape(()), weight.scale.reshape(())
        return torch._scaled_mm(given.data, right, one, other, out_dtype=wide).to(rows.dtype)
    if rows.is_cuda or cpu_scales_rows():
        return torch._scaled_mm(given.data, right, given.scale, weight.scale.t(), out_dtype=wide).to(
            rows.dtype
        )
    one = torch.ones((), device=rows.device)
    product = torch._scaled_mm(given.data, right, one, one, out_dtype=wide)
    return (product * given.scale * weight.scale.t()).to(rows.dtype)


@functools.cache
def cpu_scales_rows() -> bool:
    """Say whether this torch's CPU kernel takes a scale for each row; 2.11's knows one for the tensor.

    Where it does not, the product is made with scales of one and scaled afterwards, which is the same.
    """
    numbers = torch.ones(16, 16).to(DTYPES["e4m3"])
    try:
        torch._scaled_mm(numbers, numbers.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


PRODUCTS: Mapping[str, Product] = {"emulated": emulated_product, "scaled": scaled_product}
"""By engine."""


class QuantizedLinear(torch.nn.Module):
    """A frozen linear layer with its weight in FP8; the subclasses say which side tensor ranks share.

    It takes the arguments that megatron-core gives its own layers and returns (output, bias or None).
    """

    recipe: ClassVar[str]
    engine: ClassVar[str]
    shared_axis: ClassVar[int]
    """Which axis of the weight [out, in] tensor ranks share."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_group: dist.ProcessGroup,
        **kwargs: Any,
    ) -> None:
        """Allocate [out, in] of this rank in 8 bits and its scales, uninitialised.

        `kwargs` are about initialisation, gradients and Transformer Engine.
        """
        super().__init__()
        assert not kwargs.get("gather_output"), "the output stays with the ranks"
        self.tp_group, self.skip_bias_add = tp_group, skip_bias_add
        # The dispatcher sums what expert-tensor ranks give; see megatron-core's RowParallelLinear.
        self.is_summed = not (is_expert and (tp_group.size() > 1 or config.expert_model_parallel_size > 1))
        self.scaling = SCALINGS[self.recipe]
        shape = [output_size, input_size]
        shape[self.shared_axis] //= tp_group.size()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        data = torch.empty(shape, dtype=DTYPES["e4m3"], device=device)
        self.weight = torch.nn.Parameter(data, requires_grad=False)
        self.weight_scale: Tensor
        scales = torch.empty(
            scale_shape(data.shape, self.scaling.weights), dtype=torch.float32, device=device
        )
        self.register_buffer("weight_scale", scales, persistent=False)  # made of the weight, no file has it
        self.bias = None
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(shape[0], dtype=config.params_dtype, device=device))

    @property
    def quantized(self) -> Quantized:
        """The weight, [out, in]."""
        return Quantized(self.weight.data, self.weight_scale, self.scaling.weights)

    def store(self, weight: Tensor) -> None:
        """Quantise a weight [out, in] of any dtype and device into this layer."""
        assert weight.shape == self.weight.shape, f"{tuple(weight.shape)} is not {tuple(self.weight.shape)}"
        quantize_into(weight, self.quantized, is_power_of_two=self.scaling.is_power_of_two)

    def product(self, states: Tensor) -> Tensor:
        """Multiply states [..., in] with the weight; [..., out]."""
        rows = states.reshape(-1, states.shape[-1])
        out = PRODUCTS[self.engine](rows, self.quantized, self.scaling)
        return out.reshape(*states.shape[:-1], out.shape[-1])

    def _finished(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the bias, or hand it on."""
        if self.bias is None or self.skip_bias_add:
            return out, self.bias
        return out + self.bias, None


class QuantizedColumn(QuantizedLinear):
    """Tensor ranks share the outputs."""

    shared_axis = 0

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return this rank's outputs of states that all tensor ranks have alike."""
        return self._finished(self.product(states))


class QuantizedRow(QuantizedLinear):
    """Tensor ranks share the inputs, and each finds the scales of its own: the sums are no single product."""

    shared_axis = 1

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the outputs, summed over tensor ranks. All ranks of the group call it together."""
        out = self.product(states)
        if self.is_summed:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return self._finished(out)


class QuantizedExperts(LoopedExperts):
    """Experts with quantised layers, multiplied one after the other."""

    def _product(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        """Multiply each expert's rows by the transpose of its weight of a name."""
        layers = self._layers(name)
        product = rows.new_empty(len(rows), len(layers[0].weight))
        for layer, group in zip(layers, groups_of(ends.tolist()), strict=True):
            product[group] = layer.product(rows[group])
        return product

    def _layers(self, name: str) -> list[QuantizedLinear]:
        """Return the layers of a name of all experts."""
        return [getattr(expert, name) for expert in self.local_experts]


class QuantizedGroupedExperts(QuantizedExperts):
    """Experts whose quantised weights stand in one tensor a projection, for one grouped product on CUDA.

    Each expert's layers hold views of the stacks, so loading and names are those of single experts.
    """

    asks_host = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the experts, then put their weights behind each other."""
        super().__init__(*args, **kwargs)
        self.stacks = {name: self._stacked(name) for name in ("linear_fc1", "linear_fc2")}

    def _stacked(self, name: str) -> tuple[Tensor, Tensor]:
        """Put the weights and scales of one projection into stacks; return these."""
        layers = self._layers(name)
        weights, scales = (
            torch.empty((len(layers), *one.shape), dtype=one.dtype, device=one.device)
            for one in (layers[0].weight.data, layers[0].weight_scale)
        )
        for layer, weight, scale in zip(layers, weights, scales, strict=True):
            layer.weight.data, layer.weight_scale = weight, scale
        return weights, scales

    def _product(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        """Multiply each expert's rows by the transpose of its weight of a name, without asking how many."""
        weights, scales = self.stacks[name]
        if not len(rows):
            return rows.new_empty(0, weights.shape[1])
        given = quantize(rows, SCALINGS["rowwise"].inputs)
        return torch._scaled_grouped_mm(
            given.data,
            weights.transpose(1, 2),
            given.scale.squeeze(1),
            scales.squeeze(2),
            offs=ends.to(torch.int32),
            out_dtype=rows.dtype,
        )


def quantize_layers(spec: Any, first: int, options: ModelOptions, layers: int) -> None:
    """Put quantised linears and experts into those layers of a stage that `options.fp8` does not except.

    Args:
        spec: of local layers; the list of its layers is changed.
        first: number of its first layer in the whole model.
        options: with `fp8`.
        layers: of the whole model.
    """
    assert options.fp8 is not None, "the model is not quantised"
    own = {"recipe": options.fp8.recipe, "engine": options.engine.name}
    classes: dict[type, type] = {
        ColumnParallelLinear: type("QuantizedColumn", (QuantizedColumn,), own),
        RowParallelLinear: type("QuantizedRow", (QuantizedRow,), own),
    } | dict.fromkeys(
        FORMS.values(), QuantizedGroupedExperts if groups_experts(options) else QuantizedExperts
    )
    spec.layer_specs = [
        _replaced(layer, classes) if options.fp8.quantizes(first + number, layers) else layer
        for number, layer in enumerate(spec.layer_specs)
    ]


def groups_experts(options: ModelOptions) -> bool:
    """Say whether a layer's quantised experts are one grouped product, not one product each.

    torch's grouped FP8 product is of rows, and runs on sm_90 and sm_100 alone; a GPU that is planned for
    (`capability` None) is taken for one of them.
    """
    assert options.fp8 is not None, "the model is not quantised"
    if (options.fp8.recipe, options.engine.name) != ("rowwise", "scaled"):
        return False
    return options.device.type == "cuda" and options.device.capability in (None, (9, 0), (10, 0))


def _replaced(part: Any, classes: Mapping[type, type]) -> Any:
    """Return a spec with other classes in it, and leave the one that is given as it is.

    megatron-core 0.16 nests specs, 0.19 partial calls; submodules are dataclasses in both.
    """
    if isinstance(part, type):
        return classes.get(part, part)
    if isinstance(part, functools.partial):
        given = {name: _replaced(value, classes) for name, value in part.keywords.items()}
        return functools.partial(_replaced(part.func, classes), *part.args, **given)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [field.name for field in dataclasses.fields(part)]
        return dataclasses.replace(part, **{name: _replaced(getattr(part, name), classes) for name in names})
    return part
