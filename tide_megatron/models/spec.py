"""From an `Architecture` to megatron-core's words: a TransformerConfig and a layer spec.

Two sets of layers stand here, megatron-core's own and those it makes of Transformer Engine's (`engine`). Only
names that both supported megatron-core lines know are passed (0.16 and 0.19), and every own module in a slot
takes `**kwargs`. Fusions that need a compiler or a CUDA extension are off on CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import tide_megatron.platform

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.attention import PlannedAttention
from tide_megatron.models.engine import Engine, EngineName
from tide_megatron.models.experts import put_experts
from tide_megatron.models.hf.config import Activation
from tide_megatron.models.precision import Fp8Options, Precision
from tide_megatron.parallel.layout import Layout

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_pytorch_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}
Recompute = bool | Literal["selective"]
_FP8_ROWS = 16
_FUSED = ("silu",)  # activations with a fused kernel in megatron-core that means the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is built, beside what it is."""

    device: Device
    layout: Layout = dataclasses.field(default_factory=Layout)
    """How it is cut; already checked (`Layout.check`)."""
    precision: Precision = dataclasses.field(default_factory=Precision)
    engine: Engine = dataclasses.field(default_factory=Engine)
    """What computes the layers; already known to run here (`Engine.on`)."""
    fp8: Fp8Options | None = None
    """Hold and multiply the layers' matrices in FP8, for an engine that does; frozen models only."""
    trainable: bool = False
    """False: frozen, in eval mode."""
    attention: str = "auto"
    """`auto` or a key of `attention.KERNELS`."""
    experts: str = "auto"
    """`auto` or a key of `experts.FORMS`."""
    head: tuple[int, int] | None = None
    """Ids [start, stop) of the output head's rows that this rank holds, whatever its stage; None: all. Frozen
    models only: a trainable one keeps its head whole."""
    recompute: Recompute = False
    """What of each layer runs again in the backward pass; trainable models only. True: all of it, only its
    input is kept; `selective`: core attention and feed-forward, whose inputs are kept."""
    router_bias_rate: float = 0.0
    """Step of the load-balancing router bias after each update; 0 leaves the bias as it is."""


class ZeroCenteredNorm(torch.nn.Module):
    """RMS norm that multiplies by 1 + weight, in fp32; megatron-core's local layers have none."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs: Any) -> None:
        """Allocate the weight, [hidden_size] zeros; `config` and `kwargs` are for other norms."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        wide = states.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).to(states.dtype)


class LastLayer(TransformerLayer):  # type: ignore[misc]
    """The last layer: after its attention only the rows the view asks for go on.

    Nobody reads the others' feed-forward output, and at a few layers that is a good part of the whole model.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return ([rows, 1, hidden], None); the plan of the pass comes as `attention_bias`."""
        hidden, context = self._forward_attention(*args, **kwargs)
        return self._forward_mlp(filled(kwargs["attention_bias"].pick(hidden), self.config)), context


def filled(rows: Tensor, config: TransformerConfig) -> Tensor:
    """Add rows of zeros up to the multiple of 16 that Transformer Engine's FP8 products ask for.

    Args:
        rows: [rows, 1, hidden]; whoever reads the answers takes as many as were asked for.
        config: of the model.
    """
    missing = -len(rows) % _FP8_ROWS if config.fp8 else 0
    return torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows


def transformer_config(architecture: Architecture, options: ModelOptions) -> TransformerConfig:
    """Say in megatron-core's words what to build.

    `calculate_per_token_loss` makes megatron-core's DDP sum gradients instead of averaging them (design
    section 3). Weights stay uninitialised: they are loaded or drawn afterwards (`weights.py`).
    """
    on_cuda = options.device.type == "cuda"
    layout = options.layout
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.query_groups,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.feed_forward,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        layernorm_epsilon=architecture.epsilon,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=architecture.zero_centered_norms,
        activation_func=ACTIVATIONS[architecture.activation],
        gated_linear_unit=True,
        add_bias_linear=False,
        batch_p2p_sync=False,  # else the host waits for the device at every hop between stages
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=options.precision.dtype,
        pipeline_dtype=options.precision.dtype,
        bf16=options.precision.dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not on_cuda,
        bias_activation_fusion=on_cuda and architecture.activation in _FUSED,
        bias_dropout_fusion=on_cuda,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        **_recompute_config(options),
        **_fp8_config(options),
        **_stage_config(architecture, layout),
        **_mixture_config(architecture, options),
    )


def _recompute_config(options: ModelOptions) -> dict[str, Any]:
    """Return what makes megatron-core run layers of a trained model again in the backward pass.

    Its own `selective` is core attention alone, from which fused kernels have little to free. Norms, which it
    could make again too, fail in 0.16 without Transformer Engine (NameError).
    """
    if not (options.recompute and options.trainable):
        return {}
    if options.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "moe"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _fp8_config(options: ModelOptions) -> dict[str, Any]:
    """Return what makes Transformer Engine hold and multiply a frozen model's matrices in FP8."""
    if options.fp8 is None or options.engine.name != "te":
        return {}
    first, last = options.fp8.first_layers, options.fp8.last_layers
    return {
        "fp8": "e4m3",
        "fp8_recipe": options.fp8.recipe,
        "fp8_param": True,  # weights at rest as well; else each product would quantise them again
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def _stage_config(architecture: Architecture, layout: Layout) -> dict[str, int]:
    """Return how layers are spread over the stages, where megatron-core could not divide them evenly.

    Its `pipeline_model_parallel_layout` could say more, but asks the global state which stage it builds.
    """
    stages = layout.stage_layers(architecture.layers)
    if len(set(stages)) == 1:
        return {}
    return {
        "num_layers_in_first_pipeline_stage": stages[0],
        "num_layers_in_last_pipeline_stage": stages[-1],
    }


def _mixture_config(architecture: Architecture, options: ModelOptions) -> dict[str, Any]:
    """Return the options of mixture layers, none for a dense model."""
    experts = architecture.experts
    if experts is None:
        return {}
    is_limited = experts.kept_groups < experts.groups
    return {
        "num_moe_experts": experts.number,
        "moe_layer_freq": [int(architecture.is_mixture(layer)) for layer in range(architecture.layers)],
        "moe_ffn_hidden_size": experts.feed_forward,
        "moe_shared_expert_intermediate_size": experts.shared_feed_forward or None,
        "moe_router_topk": experts.per_token,
        "moe_router_num_groups": experts.groups if is_limited else None,
        "moe_router_group_topk": experts.kept_groups if is_limited else None,
        "moe_router_topk_scaling_factor": experts.scale,
        "moe_router_score_function": experts.score,
        # A softmax over the chosen experts alone is what normalising the chosen scores gives.
        "moe_router_pre_softmax": experts.score == "softmax" and not experts.is_normalised,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": experts.has_bias,
        "moe_router_bias_update_rate": options.router_bias_rate,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # The default, allgather, needs equal token counts on all ranks.
        "moe_token_dispatcher_type": "alltoall",
        # Without Transformer Engine megatron-core would fall back from grouped GEMM silently.
        "moe_grouped_gemm": options.engine.name == "te",
        "moe_permute_fusion": options.engine.name == "te",
    }


def block_spec(
    config: TransformerConfig, pipeline_rank: int, engine: EngineName = "local", experts: str = "sequential"
) -> Any:
    """Return an engine's layers for one stage, with our core attention, norm and last layer.

    Args:
        config: made by `transformer_config` for the same engine.
        pipeline_rank: number of the stage.
        engine: `te` for Transformer Engine's layers.
        experts: a key of `experts.FORMS`; Transformer Engine's layers have experts of their own.
    """
    is_te = engine == "te"
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=is_te, normalization="RMSNorm", pp_rank=pipeline_rank
    )
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = PlannedAttention
        if is_te:
            _name_as_local(layer.submodules)
            continue
        put_experts(layer.submodules, experts)
        if config.layernorm_zero_centered_gamma:
            _center_norms(layer.submodules, config)
    if pipeline_rank == config.pipeline_model_parallel_size - 1:
        last = copy.copy(spec.layer_specs[-1])  # megatron-core lists one object several times
        last.module = LastLayer
        spec.layer_specs[-1] = last
    if not is_te:
        # With Apex present the final norm would be Apex's, which has no RMS form; the layers' own norm does.
        # Transformer Engine's layers have none of their own (it is inside the linear behind it): the block's.
        spec.layer_norm = spec.layer_specs[0].submodules.input_layernorm
    assert spec.layer_norm is not IdentityOp, "the final norm would silently vanish"
    return spec


def _name_as_local(layer: Any) -> None:
    """Let a mixture's norm have the name in checkpoints that megatron-core's own layers give it."""
    if layer.pre_mlp_layernorm is not IdentityOp:
        layer.sharded_state_dict_keys_map = {
            **layer.sharded_state_dict_keys_map,
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }


def _center_norms(layer: Any, config: TransformerConfig) -> None:
    """Put our norm into every norm's slot of a layer."""
    layer.input_layernorm = layer.pre_mlp_layernorm = ZeroCenteredNorm
    if config.qk_layernorm:
        attention = layer.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = ZeroCenteredNorm
