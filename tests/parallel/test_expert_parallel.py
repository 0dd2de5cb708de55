"""Expert parallelism equals the dense model: logits, gradients through megatron's DDP, weights, bytes.

Every test states the dense computation it equals: one rank holding all experts and reading all samples.
"""

import dataclasses
import hashlib
import math
from pathlib import Path

from tide_megatron.platform.cpu import InertEvent

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from goldens.row import error_of
from tests.operations import Asked
from tests.unit.models.shapes import CPU, MIXTURE, architecture, view
from tide_megatron.diffusion.mask import Context
from tide_megatron.models.build import build_model
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.params import hf_shapes
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, hf_tensors, load_model, read_architecture, save_model
from tide_megatron.parallel.collectives import Traffic, barrier
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

SAMPLES = 4  # in all; each rank reads its share
LAYOUTS = [(1, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (ranks, expert)


def part_of(whole):
    """Return this rank's samples of a view, asking for all their positions."""
    share = len(whole.ids) // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    ids = whole.ids[mine]
    rows = torch.arange(ids.numel())
    return dataclasses.replace(whole, ids=ids, positions=whole.positions[mine], rows=rows)


def make(expert, read, fill, **options):
    layout = Layout(expert=expert)
    layout.check(dist.get_world_size(), experts=read.num_experts)
    model = build_model(read, make_groups(layout), ModelOptions(device=CPU, layout=layout, **options))
    return model, fill(model)


def logits_of(folder, expert, whole):
    """Load, forward this rank's samples, and report what was held, read and sent."""
    model, report = make(
        expert, read_architecture(Path(folder)), lambda model: load_model(model, Path(folder))
    )
    with torch.no_grad(), Traffic() as traffic:
        logits = model.rows(part_of(whole)) @ model.head_weight.T
    return logits.view(-1, *whole.ids.shape[1:], logits.shape[-1]), report, traffic.bytes["alltoall_base"]


def expected_share(folder, expert):
    """Return (parameters, bytes) one rank holds and reads: all of the dense part, its share of experts."""
    with HfFolder(Path(folder)) as source:
        sizes = {name: math.prod(shape) for name, shape in source.shapes.items()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    biases = sum(size for name, size in sizes.items() if name.endswith("expert_bias"))
    share = sum(sizes.values()) - routed + routed // expert
    return share - biases, 4 * share


@pytest.mark.parametrize(("ranks", "expert"), LAYOUTS)
def test_golden_logits_weights_and_bytes(pool, goldens, ranks, expert):
    import numpy as np

    folder = goldens / "teacher_llada2_moe"
    recorded = np.load(folder / "io.npz")
    ids = torch.from_numpy(recorded["ids"]).repeat(2, 1)  # two samples were recorded, four ranks read
    golden = torch.from_numpy(recorded["logits_bidir"]).repeat(2, 1, 1)
    length = ids.shape[1]
    whole = dataclasses.replace(
        view(2, samples=len(ids), length=length, kind="bidirectional"),
        ids=ids,
        context=Context(kind="bidirectional"),
    )
    answers = pool(ranks).run(logits_of, str(folder), expert, whole)
    assert error_of(torch.cat([logits for logits, _, _ in answers]), golden) <= 1e-5
    for _, report, sent in answers:
        assert (report.parameters, report.bytes_read) == expected_share(folder, expert)
        assert (sent > 0) == (expert > 1), "tokens must travel exactly when experts are elsewhere"


def gradients_of(expert, bias_rate, whole):
    """Run one backward pass through megatron's DDP; return logits, summed gradients, router biases, flags."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    model, _ = make(
        expert,
        architecture(MIXTURE),
        lambda model: draw_weights(model, 5),
        trainable=True,
        router_bias_rate=bias_rate,
        experts="grouped" if bias_rate else "auto",
    )
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, config, model, pg_collection=model.groups)
    wrapped.zero_grad_buffer()
    mine = part_of(whole)
    logits = wrapped(mine) @ model.head_weight.T
    gold = mine.ids.flatten()
    torch.nn.functional.cross_entropy(logits, gold, reduction="sum").div(whole.ids.numel()).backward()
    finalize_model_grads([wrapped], pg_collection=model.groups)
    gradients = hf_tensors(model, {name: p.main_grad.clone() for name, p in model.named_parameters()})
    flags = {name: p.allreduce for name, p in model.named_parameters() if hasattr(p, "allreduce")}
    biases = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("expert_bias")
    }
    return logits.detach(), gradients, biases, flags


@pytest.mark.parametrize(("ranks", "expert"), LAYOUTS[1:])
@pytest.mark.parametrize("bias_rate", [0.0, 0.25])
def test_training_equals_one_rank(pool, ranks, expert, bias_rate):
    whole = view(MIXTURE["vocab_size"], samples=SAMPLES, length=16, block_size=4, seed=2)
    ((dense_logits, dense_gradients, dense_biases, _),) = pool(1).run(gradients_of, 1, bias_rate, whole)
    answers = pool(ranks).run(gradients_of, expert, bias_rate, whole)
    assert error_of(torch.cat([logits for logits, *_ in answers]), dense_logits) <= 1e-5
    seen = set()
    for _, gradients, biases, flags in answers:
        for name, gradient in gradients.items():
            expected = dense_gradients[name]
            assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        seen |= gradients.keys()
        assert {name for name, together in flags.items() if not together} == {
            name for name in flags if "local_experts" in name and expert > 1
        }, "experts are summed over the ranks that share them, everything else over all"
        for name, bias in biases.items():
            assert torch.equal(bias, dense_biases[name])
            assert bool(bias.any()) == (bias_rate > 0)
    assert seen == dense_gradients.keys()


def waits(expert):
    """Return how often the host waits for the device in a mixture layer's forward and backward pass."""
    model, _ = make(
        expert,
        architecture(MIXTURE),
        lambda model: draw_weights(model, 5),
        trainable=True,
        experts="grouped",
    )
    hidden = torch.randn(5, 2, MIXTURE["hidden_size"], requires_grad=True)
    calls, synchronize = [], InertEvent.synchronize
    InertEvent.synchronize = lambda event: calls.append("event")
    try:
        with Asked() as asked:
            model.decoder.layers[1].mlp(hidden)[0].sum().backward()
    finally:
        InertEvent.synchronize = synchronize
    return len(calls), dict(asked.calls)


@pytest.mark.parametrize(("expert", "events"), [(1, 0), (2, 1)])
def test_the_host_waits_once_a_mixture_layer_for_an_exchange_and_never_without(pool, expert, events):
    """megatron-core's own dispatcher also asks twice how much it selected."""
    for found, asked in pool(expert).run(waits, expert):
        assert (found, asked) == (events, {})


def drawn_and_saved(expert, folder):
    """Draw fresh weights, write the model, read it back into this rank and write it once more.

    Experts of a frozen model may lie in one tensor.
    """
    model, _ = make(expert, architecture(MIXTURE), lambda model: draw_weights(model, 11), experts="grouped")
    before = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    save_model(model, Path(folder) / "first")
    barrier()
    again, _ = make(
        expert, read_architecture(Path(folder) / "first"), lambda m: load_model(m, Path(folder) / "first")
    )
    same = all(torch.equal(again.state_dict()[name], tensor) for name, tensor in before.items())
    save_model(again, Path(folder) / "second")
    return same


def test_fresh_weights_and_written_folders_do_not_depend_on_the_layout(pool, tmp_path):
    digests = set()
    for ranks, expert in LAYOUTS:
        folder = tmp_path / f"{ranks}-{expert}"
        folder.mkdir()
        assert all(pool(ranks).run(drawn_and_saved, expert, str(folder)))
        for turn in ("first", "second"):
            assert len(load_file(folder / turn / "model.safetensors")) == len(
                hf_shapes(architecture(MIXTURE))
            )
            digests.add(hashlib.sha256((folder / turn / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def uneven(expert):
    """Forward a different number of tokens on each rank, one of them asking for nothing."""
    model, _ = make(expert, architecture(MIXTURE), lambda model: draw_weights(model, 3))
    rank = dist.get_rank()
    mine = view(MIXTURE["vocab_size"], samples=1, length=5 + 3 * rank, block_size=4, seed=rank)
    if rank == 0:
        mine = dataclasses.replace(mine, rows=mine.rows[:0])
    with torch.no_grad():
        return mine, model.rows(mine)


def alone(views):
    model, _ = make(1, architecture(MIXTURE), lambda model: draw_weights(model, 3))
    with torch.no_grad():
        return [model.rows(one) for one in views]


def test_ranks_may_hold_different_token_counts(pool):
    answers = pool(4).run(uneven, 4)
    (expected,) = pool(1).run(alone, [mine for mine, _ in answers])
    for (_, ours), dense in zip(answers, expected, strict=True):
        assert ours.shape == dense.shape
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
