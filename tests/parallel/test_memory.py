"""What a rank never holds: logits over a whole vocabulary, an output layer nobody uses, whole teachers.

Every tensor that any operation of a step returns is looked at, also in the backward pass.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny_run import write_pair_run
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import choose_device
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import set_up
from tide_megatron.train.step import train_step

VOCABULARY, DENSE_VOCABULARY, OWN_VOCABULARY = 331, 333, 320
WORDS = [
    "teachers.moe.layout.expert=4",
    "teachers.own.layout.expert=4",
    "teachers.dense.layout.tensor=2",
    "teachers.dense.layout.pipeline=2",
]


class Shapes(TorchDispatchMode):
    """Collect the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def shapes_of_a_step(file, folder, words):
    """Return the shapes with a whole vocabulary as columns, the widest columns, and each teacher's tables."""
    recipe, _ = load_recipe(file, [f"folder={folder}", *words])
    parts = set_up(recipe, choose_device("cpu"))
    with Shapes() as shapes:
        train_step(parts.run, parts.run.read(parts.loader.update(0)), Clock(total_steps=4))
    sizes = {VOCABULARY, DENSE_VOCABULARY, DENSE_VOCABULARY + 1}  # padded to two ranks
    whole = {shape for shape in shapes.seen if len(shape) > 1 and shape[-1] in sizes}
    tables = {
        name: {
            key: tuple(parameter.shape)
            for key, parameter in teacher.model.named_parameters()
            if key.startswith(("embedding", "output_layer"))
        }
        for name, teacher in parts.run.teachers.items()
    }
    return whole, tables


def test_no_rank_has_logits_of_a_whole_vocabulary(pool, tmp_path):
    file = write_pair_run(tmp_path / "pair", vocabulary=VOCABULARY)
    ((whole, _),) = pool(1).run(shapes_of_a_step, file, tmp_path, [])
    assert {shape[-1] for shape in whole} >= {VOCABULARY, DENSE_VOCABULARY}, "one rank alone has them"
    for rank, (whole, tables) in enumerate(pool(4).run(shapes_of_a_step, file, tmp_path, WORDS)):
        assert not whole
        columns = -(-DENSE_VOCABULARY // 4)
        first = rank * columns
        assert tables["moe"]["output_layer.weight"] == (min(columns, VOCABULARY - first), 32)
        assert tables["own"]["output_layer.weight"] == (min(columns, OWN_VOCABULARY - first), 32)
        dense = tables["dense"]
        # Rows of the tied table: half of it (one more, padded) on the first stage's ranks, none behind them.
        assert dense.get("embedding.word_embeddings.weight") == ((167, 48) if rank < 2 else None)
        # Rank 0 finds its slice of the head in its half of the embedding.
        wanted = None if rank == 0 else (min(columns, DENSE_VOCABULARY - first), 48)
        assert dense.get("output_layer.weight") == wanted
