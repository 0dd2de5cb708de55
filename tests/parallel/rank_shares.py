"""What each rank of a cut model must hold of a recorded folder: from the file alone, without our table."""

import json
import math
import re

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.whole_model import whole_tensors
from tide_megatron.models.shard import Shard
from tide_megatron.models.weights import read_architecture

STAGES = {(2, 1): [{0, 1}], (3, 1): [{0, 1, 2}], (2, 2): [{0}, {1}], (3, 2): [{0, 1}, {2}]}
"""(layers, stages) -> layers of each stage."""


def head_range(vocabulary, place, size):
    width = -(-vocabulary // size)
    return min(place * width, vocabulary), min((place + 1) * width, vocabulary)


USUAL_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
LLADA_KEYS = ("embedding_size", "d_model", "n_layers", "weight_tying")


def own_share(folder, layout, rank):
    """Return (elements held, elements read, shapes of vocabulary tables) of a rank, from the file."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "llada":
        vocabulary, hidden, layers, tied = (config[key] for key in LLADA_KEYS)
    else:
        vocabulary, hidden, layers, tied = (config[key] for key in USUAL_KEYS)
    tensor, pipeline = rank % layout.tensor, rank // layout.tensor % layout.pipeline
    place = tensor + layout.tensor * (rank // (layout.tensor * layout.pipeline))  # among the stage's ranks
    expert = place // layout.expert_tensor % layout.expert
    stage = STAGES[layers, layout.pipeline][pipeline]
    held = read = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        layer = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
        if layer is None or int(layer[1]) not in stage:
            continue
        routed = re.search(r"\.experts\.(\d+)\.", name)
        if routed:
            is_here = int(routed[1]) // (config["num_experts"] // layout.expert) == expert
            size = size // layout.expert_tensor if is_here else 0
        elif "norm" not in name and ".gate." not in name:
            size //= layout.tensor
        held += 0 if name.endswith("expert_bias") else size
        read += size
    if pipeline == layout.pipeline - 1:
        held, read = held + hidden, read + hidden
    tables = {}
    width = -(-vocabulary // layout.tensor)
    if pipeline == 0:
        tables["embedding.word_embeddings.weight"] = (width, hidden)
        held += width * hidden
        read += (min((tensor + 1) * width, vocabulary) - tensor * width) * hidden
    size = layout.tensor * layout.pipeline
    start, stop = head_range(vocabulary, rank % size, size)
    embedded = range(tensor * width, (tensor + 1) * width) if pipeline == 0 else range(0)
    if not tied or not set(range(start, stop)) <= set(embedded):
        tables["output_layer.weight"] = (stop - start, hidden)
        held, read = held + (stop - start) * hidden, read + (stop - start) * hidden
    return held, read, tables


def assert_same_file(folder, layout, ranks):
    """Hold what all ranks have together against the tensors of the file they read."""
    read, size = read_architecture(folder), layout.replica_size
    heads = [head_range(read.vocabulary, place, size) for place in range(size)]
    shards = [
        Shard.of(layout, rank, len(ranks), read.layers, heads[rank % size] if size > 1 else None)
        for rank in range(len(ranks))
    ]
    tensors = [{name: torch.from_numpy(array) for name, array in arrays.items()} for arrays in ranks]
    wanted, found = load_file(folder / "model.safetensors"), whole_tensors(read, shards, tensors)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.int32), wanted[name].view(torch.int32)), name
