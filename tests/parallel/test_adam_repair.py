"""A run that is saved and continued in a fresh process state equals the uninterrupted one bit for bit.

Two ranks, a small GPTModel, megatron's DDP and distributed optimizer over torch's Adam, built from our
explicit groups, saved by `dist_checkpointing`. Each fault named in `tide_megatron.platform.adam` turns this
red.
"""

import shutil
from pathlib import Path

import tide_megatron.platform

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.transformer.transformer_config import TransformerConfig

from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

VOCABULARY, LENGTH, SAMPLES = 96, 16, 4


class Trainee:
    """A model under training, its optimizer, and one way to save and load both."""

    def __init__(self, dtype, sharding, seed):
        torch.manual_seed(seed)
        self.groups = make_groups(Layout())
        config = TransformerConfig(
            num_layers=2, hidden_size=32, num_attention_heads=2, ffn_hidden_size=64, params_dtype=dtype,
            bf16=dtype is torch.bfloat16, use_cpu_initialization=True, add_bias_linear=False,
            normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
            attention_dropout=0.0, hidden_dropout=0.0, bias_dropout_fusion=False,
            bias_activation_fusion=False,
            gradient_accumulation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
            persist_layer_norm=False,
        )  # fmt: skip
        self.model = GPTModel(
            config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=VOCABULARY,
            max_sequence_length=LENGTH, position_embedding_type="rope", pg_collection=self.groups,
            share_embeddings_and_output_weights=True,
        ).to(dtype)  # fmt: skip
        wrapping = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=False, grad_reduce_in_fp32=True
        )
        self.wrapped = DistributedDataParallel(config, wrapping, self.model, pg_collection=self.groups)
        options = OptimizerConfig(
            optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=1.0, params_dtype=dtype,
            bf16=dtype is torch.bfloat16, use_distributed_optimizer=True,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(
            options, [self.wrapped], config_overrides=get_standard_config_overrides(options),
            use_gloo_process_groups=False, pg_collection=self.groups,
        )  # fmt: skip
        self.metadata = {"distrib_optim_sharding_type": sharding, "dp_cp_group": self.groups.dp_cp}

    def train(self, steps):
        """Take the steps and return each one's mean loss and gradient norm."""
        return [self._step(step) for step in steps]

    def _step(self, step):
        draw = torch.Generator().manual_seed(1000 + step)
        all_ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=draw)
        ids = all_ids.chunk(dist.get_world_size())[dist.get_rank()]  # [samples / world, length]
        positions = torch.arange(LENGTH).expand_as(ids)
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        logits = self.wrapped(ids, positions, torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool))
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        loss.backward()
        finalize_model_grads([self.wrapped], pg_collection=self.groups)
        _, norm, _ = self.optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item(), float(norm)

    def state(self, is_loading):
        weights = self.model.sharded_state_dict(metadata=self.metadata)
        moments = self.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=self.metadata)
        return {"model": weights, "optimizer": moments}

    def save(self, folder):
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            Path(folder).mkdir()
        dist.barrier()
        dist_checkpointing.save(self.state(is_loading=False), folder)
        dist.barrier()

    def load(self, folder):
        loaded = dist_checkpointing.load(self.state(is_loading=True), folder)
        self.model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def counted_steps(self):
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return sorted({float(state["step"]) for part in parts for state in part.optimizer.state.values()})


def interrupt(dtype, sharding, folder):
    """Train 2 + 3 steps; load what was saved after 2 into a fresh trainee of another seed and train 3."""
    straight = Trainee(dtype, sharding, seed=1)
    straight.train(range(2))
    straight.save(folder)
    resumed = Trainee(dtype, sharding, seed=2)
    resumed.load(folder)
    curves = [trainee.train(range(2, 5)) for trainee in (straight, resumed)]
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    return *curves, all(torch.equal(one, other) for one, other in pairs), resumed.counted_steps()


@pytest.mark.parametrize(
    ("dtype", "sharding"),
    [
        (torch.float32, "fully_reshardable"),
        (torch.bfloat16, "fully_reshardable"),
        (torch.float32, "dp_reshardable"),
        (torch.bfloat16, "dp_reshardable"),
    ],
)
def test_resumed_equals_uninterrupted(pool, tmp_path, dtype, sharding):
    for straight, resumed, weights_are_equal, steps in pool(2).run(
        interrupt, dtype, sharding, str(tmp_path / "c")
    ):
        assert resumed == straight
        assert weights_are_equal
        assert steps == [5.0]
        assert straight[-1][0] < straight[0][0], "the losses must move, or equal ones prove nothing"


def save_fresh(folder):
    """Save an optimizer before its first update, load it, and train both."""
    fresh = Trainee(torch.float32, "fully_reshardable", seed=1)
    fresh.save(folder)
    loaded = Trainee(torch.float32, "fully_reshardable", seed=2)
    loaded.load(folder)
    return fresh.train(range(2)), loaded.train(range(2)), loaded.counted_steps()


def test_a_fresh_optimizer_can_be_saved_and_loaded(pool, tmp_path):
    for fresh, loaded, steps in pool(2).run(save_fresh, str(tmp_path / "c")):
        assert fresh == loaded
        assert steps == [2.0]


def train_unsharded_world(dtype):
    return Trainee(dtype, "fully_reshardable", seed=1).train(range(3))


def test_two_ranks_equal_one(pool):
    [one] = pool(1).run(train_unsharded_world, torch.float32)
    for two in pool(2).run(train_unsharded_world, torch.float32):
        for (loss, norm), (total, other) in zip(one, two, strict=True):
            assert total / 2 == pytest.approx(loss, rel=1e-5)
            assert other == pytest.approx(norm, rel=1e-5)
