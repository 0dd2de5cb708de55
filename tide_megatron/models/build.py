"""Build a model: megatron-core's GPTModel that reads a `View` and answers with hidden rows.

`TideModel.rows` runs embedding and decoder and returns the final-norm hidden states at the view's rows only
(the last layer drops the others as soon as attention is done with them): logits of all positions never exist,
the head is applied elsewhere to picked rows (design section 2). Groups
are explicit, so models of several layouts live in one process. Weights are uninitialised after `build_model`;
`convert.load_weights` or `convert.draw_weights` fills them. Left out: pipeline stages (the schedule comes
with the teachers that need it) and tensor-parallel cuts.
"""

from __future__ import annotations

import tide_megatron.platform  # noqa: F401 - before megatron

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.views import View
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.attention import AttentionPlan, choose_kernel, rotary_frequencies
from tide_megatron.models.spec import Options, block_spec, transformer_config
from tide_megatron.models.weights import Shard
from tide_megatron.parallel.layout import Layout


class TideModel(GPTModel):  # type: ignore[misc]
    """A GPTModel of one architecture whose forward pass goes from a view to hidden rows."""

    def __init__(self, architecture: Architecture, groups: ProcessGroupCollection, options: Options) -> None:
        """Allocate the model on its device; use `build_model`, which also checks and freezes."""
        config = transformer_config(architecture, options)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, groups.pp.rank()),
            vocab_size=architecture.vocabulary,
            max_sequence_length=architecture.max_positions,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="none",  # the attention plan rotates
            pg_collection=groups,
        )
        self.architecture = architecture
        self.shard = Shard(expert_rank=groups.ep.rank(), expert_size=groups.ep.size())
        self.groups = groups
        device = options.device.torch_device
        self._make_kernel = choose_kernel(options.attention, device.type, trainable=options.trainable)
        self._frequencies = rotary_frequencies(architecture.rotary_dim, architecture.rotary_base, device)

    @property
    def head_weight(self) -> Tensor:
        """The output head [vocabulary, hidden]: the embedding where it is tied."""
        head = self.embedding.word_embeddings if self.architecture.tied else self.output_layer
        weight: Tensor = head.weight
        return weight

    def forward(self, view: View) -> Tensor:
        """Return the final-norm hidden states [rows, hidden] at `view.rows`, in their order.

        With experts spread over ranks, all ranks of the expert group call it equally often, whatever their
        views hold: their tokens travel through each other's experts.
        """
        plan = AttentionPlan.of(view, self._make_kernel, self._frequencies, self.config.params_dtype)
        embedded = self.embedding(input_ids=view.ids, position_ids=view.positions)
        hidden = self.decoder(hidden_states=embedded, attention_mask=None, attention_bias=plan)
        answer: Tensor = hidden[: len(view.rows), 0]  # [rows or 1, 1, hidden]: the last layer picked
        return answer

    def rows(self, view: View) -> Tensor:
        """Return the hidden states a view asks for; see `forward`."""
        answer: Tensor = self(view)
        return answer


def build_model(architecture: Architecture, groups: ProcessGroupCollection, options: Options) -> TideModel:
    """Build a model with uninitialised weights on its device.

    Args:
        architecture: what it is.
        groups: its own process groups (`make_groups(options.layout)`).
        options: how it is built.

    Raises:
        ConfigError: for a layout axis that models do not have yet.
    """
    check_available(options.layout)
    model = TideModel(architecture, groups, options)
    model.to(options.device.torch_device)
    for name, parameter in model.named_parameters():
        # Router scores decide which experts run: bf16 weights would send tokens elsewhere (spec section 6.5).
        # A trained one has its fp32 form in the optimizer instead: megatron-core's sharded optimizer mixes up
        # the states of fp32 and bf16 parameters of one group when it saves them.
        # Norms are allocated in fp32 whatever the model; their fused kernels want the activations' dtype.
        is_exact = name.endswith("router.weight") and not options.trainable
        parameter.data = parameter.data.to(torch.float32 if is_exact else options.precision.dtype)
    if not options.trainable:
        model.requires_grad_(False)
    model.train(options.trainable)
    return model


def check_available(layout: Layout) -> None:
    """Refuse the axes that models do not have yet.

    Raises:
        ConfigError: naming the axis.
    """
    for axis in ("tensor", "pipeline", "expert_tensor"):
        size = getattr(layout, axis)
        if size > 1:
            raise ConfigError(
                f"layout.{axis}: {size} is not available yet; use {axis}=1 and expert parallelism"
            )
