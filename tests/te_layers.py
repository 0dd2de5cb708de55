"""Models of Transformer Engine's layers beside megatron-core's own: names, shapes, checkpoints, values."""

import dataclasses

import tide_megatron.platform
from tide_megatron.platform import start_distributed, stop_distributed

import torch

from tests.unit.models.shapes import CPU, architecture, view
from tests.unit.models.test_params import CONFIGS
from tide_megatron.checkpoint.sharded_state import loading_state
from tide_megatron.models.attention import PlannedAttention
from tide_megatron.models.build import build_model, is_extra_state
from tide_megatron.models.engine import Engine
from tide_megatron.models.params import local_params
from tide_megatron.models.precision import Precision
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, hf_tensors
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout


def compare(name, groups, device, precision="fp32", *, trainable=False, **changes):
    """Build a model with both engines from the same weights; return the largest difference of their rows.

    What must be equal is asserted: our names and shapes with the weight table, tensors under Hugging Face
    names, and where each lies in a checkpoint.
    """
    read = architecture(CONFIGS[name])
    read = dataclasses.replace(read, **changes) if changes else read
    rows, gradients, stored, places = [], [], [], []
    for engine in ("local", "te"):
        how = ModelOptions(
            device=device,
            engine=Engine(name=engine),
            precision=Precision(precision),
            trainable=trainable,
            attention="dense",
        )
        model = build_model(read, groups, how)
        draw_weights(model, 3)
        for (
            parameter
        ) in model.parameters():  # norms are drawn as ones: nothing would show a norm that is lost
            parameter.data += 0.1 * torch.sin(torch.arange(parameter.numel()).view_as(parameter)).to(
                parameter
            )
        own = {key: value for key, value in model.state_dict().items() if not is_extra_state(key)}
        table = local_params(read, model.shard, spelling=model.spelling)
        assert {key: tuple(value.shape) for key, value in own.items()} == {
            key: mapping.joined_shape for key, mapping in table
        }
        cores = [module for module in model.modules() if isinstance(module, PlannedAttention)]
        assert len(cores) == read.layers
        stored.append(hf_tensors(model, own))
        places.append(checkpoint_places(model))
        model.load_state_dict(own)  # whole without what layers keep beside weights
        rows.append(model.rows(placed(view(read.vocabulary), device)))
        if trainable:
            rows[-1].float().square().sum().backward()
            known = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
            gradients.append(hf_tensors(model, known))
    assert stored[0].keys() == stored[1].keys()
    assert places[0] == places[1]
    if trainable:
        assert gradients[0].keys() == gradients[1].keys()
        rows = [torch.cat([part.float().flatten() for part in one.values()]) for one in gradients]
    return float((rows[0] - rows[1]).norm() / rows[0].norm())


def placed(seen, device):
    """Return a view whose tensors are on a device."""
    found = {field.name: getattr(seen, field.name) for field in dataclasses.fields(seen)}
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(
        seen, **{name: value.to(device.torch_device) for name, value in tensors.items()}
    )


def checkpoint_places(model):
    """Return where each tensor of a model lies in a checkpoint, and what is asked for beside tensors."""
    found = set()
    for entry in loading_state(model, None)["model"].values():
        parts = [entry] if hasattr(entry, "global_offset") else entry.build()
        found |= {(part.key, part.global_offset, part.global_shape, str(part.replica_id)) for part in parts}
    return found


def compare_all():
    """Print a line for every architecture: its name, difference of rows, and of gradients where trained."""
    start_distributed(CPU)
    groups = make_groups(Layout())
    for name in CONFIGS:
        print(name, compare(name, groups, CPU), compare(name, groups, CPU, trainable=True), flush=True)
    print("centred", compare("a2d-qwen3", groups, CPU, zero_centered_norms=True), 0.0, flush=True)
    stop_distributed()
