"""A checkpoint that an earlier release wrote is read, told and gone on from.

`old_checkpoint/` was written on two ranks by release 879fa9c: the student below in bf16 after three updates
with a constant gradient, its tensors in files of that release's own kind.
"""

from pathlib import Path

import tide_megatron.platform

from typer.testing import CliRunner

from tests.unit.models.shapes import CPU
from tide_megatron.base.clock import Clock
from tide_megatron.checkpoint.load import load_checkpoint
from tide_megatron.checkpoint.metadata import read_metadata
from tide_megatron.checkpoint.retention import listed
from tide_megatron.checkpoint.sharded_state import ShardedState, optimizer_steps
from tide_megatron.checkpoint.stored import StoredTensors
from tide_megatron.commands import app
from tide_megatron.diffusion.mask import Context
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import build_model
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.train.recipe import Optimizer
from tide_megatron.train.student import Student

[OLD] = listed(Path(__file__).parent / "old_checkpoint")
CONFIG = {
    "model_type": "a2d-qwen3",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 21,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def make_student(seed):
    how = ModelOptions(device=CPU, precision=Precision.on("bf16", CPU), trainable=True)
    model = build_model(ARCHITECTURES["a2d-qwen3"].from_hf(CONFIG), make_groups(Layout()), how)
    draw_weights(model, seed)
    return Student(model, Context(kind="block_diffusion", block_size=16), 1, Optimizer(warmup=0.0))


def update(student, clock):
    for buffer in student.wrapped.buffers:
        buffer.grad_data.fill_(1e-3)
    assert student.update(clock, finite=True).applied
    return clock.after_step(applied=True, samples=4)


def state_of(student):
    """Return everything that this rank would write, and how many updates were counted."""
    state = ShardedState(student.model, student.optimizer)
    state.describe()
    values = {(shard.name, shard.offsets): shard.values.clone() for shard in state.shards}
    return values, optimizer_steps(student.optimizer)


def trained():
    """Return the state after three updates and after four."""
    student, clock = make_student(1), Clock(total_steps=8)
    for _ in range(3):
        clock = update(student, clock)
    after_three = state_of(student)
    update(student, clock)
    return after_three, state_of(student)


def gone_on():
    """Return the same, the first three updates from the old checkpoint."""
    student = make_student(2)
    load_checkpoint(OLD, student.model, student.optimizer)
    after_three = state_of(student)
    update(student, read_metadata(OLD).clock)
    return after_three, state_of(student)


def test_it_is_gone_on_from_to_the_last_bit(pool):
    """CPUs differ in the last bit of the random numbers that both students began with; nothing else may."""
    for wanted, found in zip(pool(2).run(trained), pool(2).run(gone_on), strict=True):
        for (values, steps), (own, own_steps) in zip(wanted, found, strict=True):
            assert steps == own_steps
            assert values.keys() == own.keys()
            for key in values:
                error = (own[key].double() - values[key].double()).abs().max()
                assert error <= 2e-9 * values[key].double().abs().max(), key


def test_it_is_told_and_verified():
    said = CliRunner().invoke(app, ["checkpoint", "verify", str(OLD)])
    assert said.exit_code == 0, said.output
    said = " ".join(
        CliRunner().invoke(app, ["checkpoint", "inspect", str(OLD)], env={"COLUMNS": "200"}).output.split()
    )
    assert "step 3 of 8, 0 skipped samples 12 optimizer steps 3" in said
    assert read_metadata(OLD).recipe == {"seed": 3}
    stored = StoredTensors(OLD)
    assert stored.read("optimizer.state.param.embedding.word_embeddings.weight").shape == (21, 8)
