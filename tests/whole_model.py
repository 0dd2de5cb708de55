"""The way back from a cut model: every rank's tensors in, whole Hugging Face tensors out."""

import torch

from tide_megatron.models.params import LOCAL, hf_shapes, local_params
from tide_megatron.models.shard import Part


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def whole_tensors(architecture, shards, ranks, spelling=LOCAL):
    """Return Hugging Face name -> whole tensor; copies on several ranks must agree bit for bit.

    Args:
        architecture: of the model.
        shards: the place of each rank; together they hold the model at least once.
        ranks: what each of them holds, by local name.
        spelling: of these names.
    """
    whole = dict.fromkeys(hf_shapes(architecture))
    known = {}
    for rank, (shard, own) in enumerate(zip(shards, ranks, strict=True)):
        for name, mapping in local_params(architecture, shard, spelling=spelling):
            assert tuple(own[name].shape) == mapping.joined_shape, f"rank {rank}: {name}"
            for source, values in zip(mapping.sources, mapping.split(own[name]), strict=True):
                shape = mapping.sources[source]
                if source not in known:
                    whole[source] = torch.empty(shape, dtype=values.dtype)
                    known[source] = torch.zeros(shape, dtype=torch.bool)
                assert values.dtype is whole[source].dtype, f"rank {rank}: {source}"
                part = mapping.parts.get(source) or Part(ranges=((0, shape[0]),))
                begin = 0
                for start, stop in part.ranges:  # zero rows behind them are padding
                    given = values.narrow(part.axis, begin, stop - start)
                    here, seen = (
                        tensor.narrow(part.axis, start, stop - start)
                        for tensor in (whole[source], known[source])
                    )
                    assert torch.equal(bits(here[seen]), bits(given[seen])), (
                        f"{source}: rank {rank} holds other values than a rank before it"
                    )
                    here.copy_(given)
                    seen.fill_(True)
                    begin += stop - start
    lacking = [name for name in whole if name not in known or not known[name].all()]
    assert not lacking, f"not whole on these ranks: {lacking}"
    return whole
