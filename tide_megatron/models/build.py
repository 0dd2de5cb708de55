"""Build a model, or a rank's part of one: megatron-core's GPTModel that reads a `View`.

`TideModel.forward` goes from a view to the final-norm hidden states at the view's rows only (the last layer
drops the others as soon as attention is done with them): logits of all positions never exist, the head is
applied elsewhere to picked rows (design section 2). On other stages than the last it gives what the next one
reads. Groups are explicit, so models of several layouts live in one process. Weights are uninitialised after
`build_model`; `weights.load_model` or `weights.draw_weights` fills them.

A frozen model never allocates megatron-core's output layer. Every rank of every stage holds the slice of the
head that `ModelOptions.head` names: a head is cut by vocabulary over a group of its own, whatever the layers'
layout (design section 3). Left out: a trainable model cut over tensor or pipeline ranks.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import tide_megatron.platform

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from tide_megatron.base.device_kind import kind_of
from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.views import View
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.attention import (
    AttentionPlan,
    PassAttention,
    choose_kernel,
    fit,
    rotary_frequencies,
)
from tide_megatron.models.dispatcher import own_dispatchers
from tide_megatron.models.embedding import look_up
from tide_megatron.models.experts import GroupedExperts, choose_form
from tide_megatron.models.params import FUSED, LOCAL
from tide_megatron.models.quantized import groups_experts, quantize_layers
from tide_megatron.models.shard import Shard
from tide_megatron.models.spec import ModelOptions, block_spec, transformer_config
from tide_megatron.parallel.layout import Layout

log = logging.getLogger(__name__)


class HeadSlice(torch.nn.Module):
    """Some rows of an output head, under the name megatron-core gives the whole one."""

    def __init__(self, rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate [rows, hidden], uninitialised."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(rows, hidden, dtype=dtype, device=device))


class TideModel(GPTModel):  # type: ignore[misc]
    """A GPTModel of one architecture whose forward pass goes from a view to hidden rows."""

    def __init__(
        self, architecture: Architecture, groups: ProcessGroupCollection, options: ModelOptions
    ) -> None:
        """Allocate the model on its device; use `build_model`, which also checks and freezes."""
        config = transformer_config(architecture, options)
        shard = _shard(architecture, groups, options)
        spec = block_spec(config, groups.pp.rank(), options.engine.name, _experts(architecture, options))
        if options.fp8 is not None and options.engine.name != "te":
            quantize_layers(spec, shard.first_layer, options, architecture.layers)
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=shard.padded_vocabulary(architecture.vocabulary),
            max_sequence_length=architecture.max_positions,
            pre_process=shard.is_first,
            post_process=options.trainable,  # the output layer, and with it the final norm
            share_embeddings_and_output_weights=options.trainable and architecture.tied,
            position_embedding_type="none",  # the attention plan rotates
            pg_collection=groups,
        )
        if options.engine.name != "te":
            own_dispatchers(self, groups)
        self.architecture = architecture
        self.spelling = FUSED if options.engine.name == "te" else LOCAL
        self.shard = shard
        self.groups = groups
        device = options.device.torch_device
        if not options.trainable:
            self._add_end(spec, device)
        self.make_kernel = choose_kernel(
            options.attention, kind_of(device), trainable=options.trainable, owner=architecture.model_type
        )
        # In the model's dtype, as Hugging Face's models round it; on the CPU it multiplies as a number does.
        self._embedding_scale = torch.tensor(architecture.embedding_scale, dtype=config.params_dtype)
        self._frequencies = rotary_frequencies(architecture.rotary_dim, architecture.rotary_base, device)

    def _add_end(self, spec: Any, device: torch.device) -> None:
        """Add the final norm and this rank's slice of the head to a block built without output layer."""
        architecture, config = self.architecture, self.config
        if self.shard.is_last:
            self.decoder.final_layernorm = spec.layer_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        if not self._is_head_embedded:
            start, stop = self.shard.head_ids(architecture.vocabulary)
            self.output_layer = HeadSlice(stop - start, architecture.hidden, config.params_dtype, device)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the view's ids."""
        return self.shard.is_first

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's forward pass gives rows."""
        return self.shard.is_last

    @property
    def _is_head_embedded(self) -> bool:
        return self.architecture.tied and self.shard.embeds_head(self.architecture.vocabulary)

    @property
    def head_start(self) -> int:
        """The first id of this rank's slice of the output head."""
        return self.shard.head_ids(self.architecture.vocabulary)[0]

    @property
    def head_weight(self) -> Tensor:
        """The slice of the output head [ids, hidden] of this rank; where tied, rows of its embedding."""
        if not self._is_head_embedded:
            own: Tensor = self.output_layer.weight
            return own
        table: Tensor = self.embedding.word_embeddings.weight
        if self.shard.head is None:
            return table
        first = self.shard.embedding_ids(self.architecture.vocabulary)[0]
        start, stop = (max(0, identity - first) for identity in self.shard.head)
        return table[start:stop]

    def forward(self, view: View, reading: PassAttention | None = None) -> Tensor:
        """Run this rank's layers; stages behind the first read what `set_input_tensor` was given.

        With experts spread over ranks, all ranks of the expert group call it equally often, whatever their
        views hold: their tokens travel through each other's experts.

        Args:
            view: the same on all ranks of a replica.
            reading: how a decoder attends, who asks for rows where they are computed, shifted model or not;
                None: by the model's own kernel, under the view's context.

        Returns:
            On the last stage the final-norm hidden states [rows, hidden] that predict `view.rows`, in their
            order; on others [tokens, samples, hidden] for the next stage.
        """
        if reading is None:
            view = view.shifted() if self.architecture.is_shifted else view
            view = fit(view, self.make_kernel)
            reading = PassAttention(
                kernel=self.make_kernel(view.context, view.length, view.numbers(), view.ids.device)
            )
        plan = self.plan(view, reading)
        embedded = self.embed(view) if self.is_first_stage else None
        hidden: Tensor = self.decoder(hidden_states=embedded, attention_mask=None, attention_bias=plan)
        if not self.is_last_stage:
            return hidden
        return hidden[: len(view.rows), 0]  # [rows or 1, 1, hidden]: the last layer picked

    def plan(self, view: View, reading: PassAttention) -> AttentionPlan:
        """Make what all layers share of a pass over a view."""
        return AttentionPlan.of(view, reading, self._frequencies, self.config.params_dtype)

    def embed(self, view: View) -> Tensor:
        """Return [tokens, samples, hidden]: there are no positions, token types or dropout to add."""
        table = self.embedding.word_embeddings.weight
        embedded: Tensor
        if torch.is_grad_enabled() and hasattr(table, "main_grad"):  # trained inside megatron-core's DDP
            embedded = look_up(table, view.ids)
        else:
            embedded = self.embedding(input_ids=view.ids, position_ids=view.positions)
        return embedded if self.architecture.embedding_scale == 1.0 else embedded * self._embedding_scale

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe every tensor for a checkpoint; see megatron-core's.

        What Transformer Engine keeps beside weights is left out: it is empty without delayed scaling, which
        is refused, and other engines could not load a checkpoint that has it, nor this one what lacks it.
        """
        found: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.spelling is LOCAL:
            return found
        return {name: entry for name, entry in found.items() if not is_extra_state(name)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state; one without what layers keep beside weights counts as whole."""
        absent = {name: None for name in self.state_dict() if is_extra_state(name) and name not in state_dict}
        return super().load_state_dict({**state_dict, **absent}, strict, assign)

    def rows(self, view: View, reading: PassAttention | None = None) -> Tensor:
        """Return the hidden states a view asks for, of a model of one stage; see `forward`."""
        assert self.config.pipeline_model_parallel_size == 1, "several stages need a pipeline schedule"
        answer: Tensor = self(view, reading)
        return answer


def is_extra_state(name: str) -> bool:
    """Say whether a name of a state is one of what layers keep beside weights, which FP8 scales would be."""
    return "_extra_state" in name.rpartition(".")[2]


def build_model(
    architecture: Architecture, groups: ProcessGroupCollection, options: ModelOptions
) -> TideModel:
    """Build this rank's part of a model with uninitialised weights on its device.

    Args:
        architecture: what it is.
        groups: its own process groups (`make_groups(options.layout)`).
        options: how it is built.

    Raises:
        ConfigError: for a layout axis that trainable models do not have yet, widths that the layout cannot
            share, or a head slice outside the vocabulary.
    """
    check_available(options.layout, trainable=options.trainable)
    check_widths(architecture, options.layout)
    assert options.head is None or not options.trainable, "a trainable model keeps its head whole"
    assert options.fp8 is None or not options.trainable, "only frozen models are quantised"
    # With gradients on, Transformer Engine keeps a transposed copy of a quantised weight for the way back.
    with contextlib.nullcontext() if options.trainable else torch.no_grad():
        model = TideModel(architecture, groups, options)
    model.to(options.device.torch_device)
    for name, parameter in model.named_parameters():
        # What is quantised has its format from its layer; Transformer Engine's kind says it were bf16.
        if parameter.dtype.itemsize == 1 or is_float8tensor(parameter):
            continue
        # Router scores decide which experts run: bf16 weights would send tokens elsewhere (spec section 6.5).
        # A trained one has its fp32 form in the optimizer instead: megatron-core's sharded optimizer mixes up
        # the states of fp32 and bf16 parameters of one group when it saves them.
        # Norms are allocated in fp32 whatever the model; their fused kernels want the activations' dtype.
        is_exact = name.endswith("router.weight") and not options.trainable
        parameter.data = parameter.data.to(torch.float32 if is_exact else options.precision.dtype)
    if not options.trainable:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, GroupedExperts):
                module.lay_out()
    model.train(options.trainable)
    return model


def _experts(architecture: Architecture, options: ModelOptions) -> str:
    """Choose the form of a model's experts; of a dense model, and where the engine brings its own, any."""
    experts, fp8 = architecture.experts, options.fp8
    if experts is None or options.engine.name == "te":
        return "sequential"
    if fp8 is not None:
        how = "in one grouped product" if groups_experts(options) else "one after the other"
        log.info("experts of %s: FP8, %s, on %s", architecture.model_type, how, options.device.type)
        mixtures = [layer for layer in range(architecture.layers) if architecture.is_mixture(layer)]
        if all(fp8.quantizes(layer, architecture.layers) for layer in mixtures):
            return "sequential"  # and each of them is replaced
    widths = (architecture.hidden, experts.feed_forward // options.layout.expert_tensor)
    return choose_form(
        options.experts, options.device, options.precision.dtype, widths, architecture.model_type
    )


def check_available(layout: Layout, *, trainable: bool = False) -> None:
    """Refuse the axes that trainable models do not have yet; frozen ones have all.

    Raises:
        ConfigError: naming the axis.
    """
    for axis in ("tensor", "pipeline", "expert_tensor") if trainable else ():
        size = getattr(layout, axis)
        if size > 1:
            raise ConfigError(
                f"layout.{axis}: {size} is not available yet for a model that is trained; "
                f"use {axis}=1 and expert parallelism"
            )


def check_widths(architecture: Architecture, layout: Layout) -> None:
    """Refuse cuts through which a feed-forward layer does not go evenly (heads: `Layout.check`).

    Raises:
        ConfigError: naming the axis and the nearest size that divides.
    """
    experts = architecture.experts
    widths = [("tensor", architecture.feed_forward, "feed-forward")]
    if experts is not None:
        widths.append(("tensor", experts.shared_feed_forward, "shared expert"))
        widths.append(("expert_tensor", experts.feed_forward, "expert"))
    for axis, width, name in widths:
        size = getattr(layout, axis)
        if width % size:
            # A divisor of the size fits wherever the size did.
            raise ConfigError(
                f"layout.{axis}: {size} ranks cannot share the {name} width {width} evenly; "
                f"use {axis}={math.gcd(size, width)}"
            )


def _shard(architecture: Architecture, groups: ProcessGroupCollection, options: ModelOptions) -> Shard:
    """Say what this rank holds; the groups must be those of the layout."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = Shard.of(options.layout, rank, world, architecture.layers, options.head)
    found = [(group.rank(), group.size()) for group in (groups.tp, groups.ep, groups.expt_tp)]
    assert found == [
        (shard.tensor_rank, shard.tensor_size),
        (shard.expert_rank, shard.expert_size),
        (shard.expert_tensor_rank, shard.expert_tensor_size),
    ], f"groups of another layout than {options.layout}"
    return shard
