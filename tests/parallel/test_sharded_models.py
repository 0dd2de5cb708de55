"""Frozen models cut over tensor, pipeline, expert and expert-tensor ranks give the recorded logits.

Every cell of a mandatory matrix: model x layout. Each rank has samples of its own; the sources of a replica
are the microbatches of megatron-core's forward-only schedule; the rows of the last stage go to all ranks of
the replica, each of which multiplies them with its slice of the head, and the slices together are compared
with logits recorded from the reference. What a rank holds and reads is compared with arithmetic over the
shapes in the file's header, written here without our table of weights; what all ranks hold together gives the
file's tensors back, bit for bit. The last test prints the matrix and fails when a cell did not run.
"""

import dataclasses
import itertools
import math
from pathlib import Path

import tide_megatron.platform

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

from goldens.row import LOGIT_TOLERANCE, error_of
from tests.parallel.rank_shares import assert_same_file, head_range, own_share
from tests.unit.models.shapes import CPU, DENSE, MIXTURE, architecture, view
from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.mask import Context
from tide_megatron.models.build import build_model
from tide_megatron.models.params import num_local_bytes
from tide_megatron.models.shard import Shard
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, load_model, read_architecture
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout


def layout_name(layout):
    sizes = zip(("TP", "PP", "EP"), dataclasses.astuple(layout), strict=False)
    return " ".join(f"{axis}{size}" for axis, size in sizes if size > 1) or "1 rank"


BIDIRECTIONAL = Context(kind="bidirectional")
CAUSAL = Context(kind="block_causal", block_size=1)

CELLS = {
    layout_name(layout): (layout.pipeline * math.lcm(layout.tensor, layout.expert), layout)
    for layout in (
        Layout(tensor=tensor, pipeline=pipeline, expert=expert)
        for tensor, pipeline, expert in itertools.product((1, 2, 4), (1, 2), (1, 2, 4))
    )
}
"""Every product of the axes, on as few ranks as it takes."""
CELLS |= {
    "TP2 PP2, 2 replicas": (8, Layout(tensor=2, pipeline=2)),
    "PP2 EP2, 8 ranks": (8, Layout(pipeline=2, expert=2)),
    "EP2 ETP2": (4, Layout(expert=2, expert_tensor=2)),
    "TP2 PP2 EP2 ETP2": (8, Layout(tensor=2, pipeline=2, expert=2, expert_tensor=2)),
}
RECORDED = {
    # model -> [(ids, context or None: block diffusion of the recorded block size, logits)]
    "teacher_wedlm_like": [
        ("causal_ids", CAUSAL, "logits_native_causal"),
        ("xt_x0_ids", None, "xt_x0_logits"),
    ],
    "student_a2d_qwen3": [("bidir_ids", BIDIRECTIONAL, "logits_nomask"), ("ids", None, "logits_bd3lm")],
    "teacher_llada2_moe": [("ids", BIDIRECTIONAL, "logits_bidir")],
    "teacher_llada": [("ids", BIDIRECTIONAL, "logits_bidir")],
    "teacher_llada_moe": [("ids", BIDIRECTIONAL, "logits_bidir")],
    "teacher_dream": [("ids", BIDIRECTIONAL, "logits_shifted")],
}
NOT_FOR_DENSE = {name for name, (_, layout) in CELLS.items() if layout.expert * layout.expert_tensor > 1}
"""Cells that models without experts cannot have."""
KEY_HEADS = {"teacher_llada": 4, "teacher_llada_moe": 4}
"""Key-value heads where there are more than 2, so that 4 tensor ranks can share them."""
DENSE_MODELS = {"teacher_wedlm_like", "student_a2d_qwen3", "teacher_llada", "teacher_dream"}
TOGETHER = {
    "teacher_llada2_moe": ("EP8 beside TP2 PP2", Layout(expert=8)),
    "teacher_wedlm_like": ("TP2 PP2 beside EP8", Layout(tensor=2, pipeline=2)),
}
"""Two models that live on the same eight ranks: model -> (cell, layout)."""
MATRIX: dict[tuple[str, str], str] = {}
"""What became of each cell of this run."""


def source_view(rank, ids, context, positions=None):
    """Return a rank's own microbatch of the two recorded samples: its pair, its rows in its order."""
    pair = torch.tensor([(0, 1), (1, 0), (0, 0), (1, 1)][rank % 4])
    length = ids.shape[1] // context.parts
    rows = torch.randperm(2 * ids.shape[1], generator=torch.Generator().manual_seed(rank))
    plain = torch.arange(length).repeat(context.parts).expand(2, -1)
    base = view(2, samples=2, length=length, kind=context.kind, block_size=max(1, context.block_size))
    return pair, dataclasses.replace(
        base,
        ids=ids[pair],
        positions=plain if positions is None else positions[pair],
        context=context,
        rows=rows[: len(rows) - rank],
    )


@torch.no_grad()  # what a stage receives requires a gradient
def forward_sources(model, views):
    """Forward the views of all sources; give their rows to every rank of the replica."""
    groups, hidden = model.groups, model.architecture.hidden
    assert not any(parameter.requires_grad for parameter in model.parameters())

    def step(views, model):
        return model(next(views)), lambda output, non_loss_data=False: output

    if groups.pp.size() == 1:
        return [model(one) for one in views]
    outputs = forward_backward_pipelining_without_interleaving(
        forward_step_func=step,
        data_iterator=iter(views),
        model=model,
        num_microbatches=len(views),
        seq_length=views[0].ids.shape[1],
        micro_batch_size=len(views[0].ids),
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=P2PCommunicator(groups.pp, model.config),
        pg_collection=groups,
    )
    assert len(outputs) == (len(views) if model.is_last_stage else 0)
    source = dist.get_process_group_ranks(groups.mp)[-1]
    rows = []
    for number, one in enumerate(views):
        mine = outputs[number].contiguous() if outputs else torch.empty(len(one.rows), hidden)
        assert mine.shape == (len(one.rows), hidden)
        dist.broadcast(mine, src=source, group=groups.mp)
        rows.append(mine)
    return rows


def make(read, layout, head=None, experts="auto"):
    world = dist.get_world_size()
    layout.check(
        world,
        heads=read.heads,
        groups=read.query_groups,
        experts=read.num_experts,
        layers=read.layers,
    )
    options = ModelOptions(device=CPU, layout=layout, head=head, experts=experts)
    return build_model(read, make_groups(layout), options)


def golden_cell(folder, layout, cases):
    """Return, for each case and source of this rank's replica, this rank's columns of the logits; and facts.

    Among these are all tensors this rank holds, as arrays.
    """
    read = read_architecture(Path(folder))
    rank, world, size = dist.get_rank(), dist.get_world_size(), layout.replica_size
    head = head_range(read.vocabulary, rank % size, size) if size > 1 else None
    model = make(read, layout, head)
    report = load_model(model, Path(folder))
    first = rank // size * size
    columns = []
    for case in cases:
        views = [source_view(source, *case)[1] for source in range(first, first + size)]
        columns.append([rows @ model.head_weight.T for rows in forward_sources(model, views)])
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    planned = num_local_bytes(read, Shard.of(layout, rank, world, read.layers, head), torch.uint8)
    arrays = {name: value.numpy() for name, value in tensors.items()}
    return columns, arrays, report, planned, model.head_start


def read_cases(folder, name):
    import numpy as np

    recorded = np.load(folder / "io.npz")
    cases, golden = [], []
    for ids, told, logits in RECORDED[name]:
        positions, context = None, told
        if told is None:
            context = Context(kind="block_diffusion", block_size=int(recorded["block_size"]))
            positions = torch.from_numpy(recorded["position_ids"])
        cases.append((torch.from_numpy(recorded[ids]), context, positions))
        golden.append(torch.from_numpy(recorded[logits]))
    return cases, golden


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", RECORDED)
def test_golden_logits_in_every_layout(pool, goldens, name, cell):
    ranks, layout = CELLS[cell]
    folder = goldens / name
    reason = None
    if cell in NOT_FOR_DENSE and name in DENSE_MODELS:
        reason = "the model has no experts"
    if KEY_HEADS.get(name, 2) % layout.tensor:
        reason = "2 key-value heads cannot be shared evenly by tensor=4"
    if reason is not None:
        read = read_architecture(folder)
        with pytest.raises(ConfigError, match=reason):
            layout.check(ranks, groups=read.query_groups, experts=read.num_experts)
        MATRIX[name, cell] = "no experts" if "experts" in reason else "2 key-value heads"
        return
    cases, golden = read_cases(folder, name)
    answers = pool(ranks).run(golden_cell, str(folder), layout, cases)
    worst, size = 0.0, layout.replica_size
    for rank, (_, arrays, report, planned, start) in enumerate(answers):
        local_params, read, tables = own_share(folder, layout, rank)
        assert report.parameters == planned == local_params, f"rank {rank}"
        assert report.bytes_read == 4 * read, f"rank {rank}"
        shapes = {key: array.shape for key, array in arrays.items()}
        vocabulary = {key: shape for key, shape in shapes.items() if "embedding" in key or "output" in key}
        assert vocabulary == tables, f"rank {rank}"
        first = rank // size * size
        for number, (case, logits) in enumerate(zip(cases, golden, strict=True)):
            pair, own = source_view(rank, *case)
            parts = [answers[other][0][number][rank - first] for other in range(first, first + size)]
            ours = torch.cat(parts, dim=-1)
            worst = max(worst, error_of(ours, logits[pair].flatten(0, 1)[own.rows]))
        assert start == head_range(golden[0].shape[-1], rank - first, size)[0]
    assert worst <= LOGIT_TOLERANCE
    assert_same_file(folder, layout, [arrays for _, arrays, *_ in answers])
    MATRIX[name, cell] = f"{worst:.1e}"


def together(folders, cases):
    """Load both models on these ranks, then forward them in turns; return each one's columns, by source."""
    rank, models, columns = dist.get_rank(), {}, {}
    for name, (_, layout) in TOGETHER.items():
        read, size = read_architecture(Path(folders[name])), layout.replica_size
        head = head_range(read.vocabulary, rank % size, size) if size > 1 else None
        models[name] = make(read, layout, head)
        load_model(models[name], Path(folders[name]))
        columns[name] = []
    for number in range(max(map(len, cases.values()))):
        for name, model in models.items():
            if number < len(cases[name]):
                size = TOGETHER[name][1].replica_size
                first = rank // size * size
                views = [
                    source_view(source, *cases[name][number])[1] for source in range(first, first + size)
                ]
                columns[name].append([rows @ model.head_weight.T for rows in forward_sources(model, views)])
    return columns


def test_two_models_in_two_layouts_on_the_same_eight_ranks(pool, goldens):
    folders = {name: str(goldens / name) for name in TOGETHER}
    cases, golden = {}, {}
    for name in TOGETHER:
        cases[name], golden[name] = read_cases(goldens / name, name)
    answers = pool(8).run(together, folders, cases)
    for name, (cell, layout) in TOGETHER.items():
        worst, size = 0.0, layout.replica_size
        for rank in range(8):
            first = rank // size * size
            for number, (case, logits) in enumerate(zip(cases[name], golden[name], strict=True)):
                pair, own = source_view(rank, *case)
                parts = [answers[other][name][number][rank - first] for other in range(first, first + size)]
                wanted = logits[pair].flatten(0, 1)[own.rows]
                worst = max(worst, error_of(torch.cat(parts, dim=-1), wanted))
        MATRIX[name, cell] = f"{worst:.1e}"
        assert worst <= LOGIT_TOLERANCE, name


def drawn_cell(config, layout, head, is_silent):
    """Return the replica's rows of drawn models, this rank's head slice and whether it costs storage."""
    read = architecture(config)
    model = make(read, layout, head, "grouped" if is_silent else "auto")
    draw_weights(model, 11)
    first = dist.get_rank() // layout.replica_size * layout.replica_size
    views = [
        view(read.vocabulary, samples=2, length=8, block_size=4, seed=source)
        for source in range(first, first + layout.replica_size)
    ]
    if is_silent:
        views = [dataclasses.replace(one, rows=one.rows[: 5 * number]) for number, one in enumerate(views)]
    is_view = "output_layer.weight" not in dict(model.named_parameters())
    return forward_sources(model, views), model.head_weight.clone(), is_view


def drawn_alone(config, number):
    model = make(architecture(config), Layout())
    draw_weights(model, 11)
    views = [
        view(config["vocab_size"], samples=2, length=8, block_size=4, seed=source) for source in range(number)
    ]
    return [model.rows(one) for one in views], model.head_weight.clone()


@pytest.mark.parametrize("is_silent", [False, True], ids=["all rows", "a source without rows"])
@pytest.mark.parametrize("cell", ["TP2", "PP2", "TP2 PP2", "PP2 EP2", "EP2 ETP2"])
@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_drawn_weights_are_the_same_in_every_layout(pool, config, cell, is_silent):
    ranks, layout = CELLS[cell]
    if cell in NOT_FOR_DENSE and config is DENSE:
        layout = dataclasses.replace(layout, expert=1, expert_tensor=1)
    ((expected, _),) = pool(1).run(drawn_alone, config, ranks)
    for rank, (rows, _, _) in enumerate(pool(ranks).run(drawn_cell, config, layout, None, is_silent)):
        first = rank // layout.replica_size * layout.replica_size
        for source, ours in enumerate(rows):
            wanted = expected[first + source]
            wanted = wanted[: 5 * source] if is_silent else wanted
            assert ours.shape == wanted.shape
            assert error_of(ours, wanted) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("head", [None, (0, 61), (0, 31), (40, 61), (7, 7), (61, 61)])
@pytest.mark.parametrize("tied", [True, False])
def test_every_stage_holds_its_slice_of_the_head(pool, head, tied):
    config = {**DENSE, "tie_word_embeddings": tied}
    ((_, whole),) = pool(1).run(drawn_alone, config, 1)
    for layout in (Layout(pipeline=2), Layout(tensor=2)):
        answers = pool(2).run(drawn_cell, config, layout, head, False)
        start, stop = head or (0, 61)
        for rank, (_, weight, is_view) in enumerate(answers):
            assert weight.shape == (stop - start, 32)
            assert torch.equal(weight, whole[start:stop])
            rows = {(2, 0): range(61), (2, 1): range(0)} if layout.pipeline == 2 else {}
            rows |= {(1, 0): range(31), (1, 1): range(31, 61)}
            is_first = layout.pipeline == 1 or rank == 0
            has_it = is_first and set(range(start, stop)) <= set(rows[layout.pipeline, rank])
            assert is_view == (tied and has_it)


def test_the_whole_matrix_ran(goldens, capsys):
    width = max(len(cell) for cell in CELLS)
    with capsys.disabled():
        print("\n\nlargest error of logits, relative to the larger of 1 and the value")
        print("".ljust(width), *(name.rjust(22) for name in RECORDED))
        for cell in CELLS:
            line = (MATRIX.get((name, cell), "NOT RUN").rjust(22) for name in RECORDED)
            print(cell.ljust(width), *line)
        for name, (cell, _) in TOGETHER.items():
            print(f"{cell}: {name} {MATRIX.get((name, cell), 'NOT RUN')}")
    wanted = {(name, cell) for name in RECORDED for cell in CELLS}
    assert MATRIX.keys() == wanted | {(name, cell) for name, (cell, _) in TOGETHER.items()}
