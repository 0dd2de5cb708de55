"""What is kept for the backward pass, counted in bytes, and gradients that do not change by a bit."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.unit.models.shapes import CPU, DENSE, MIXTURE, architecture, view
from tide_megatron.models.build import build_model
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights


def kept_and_gradients(groups, config, recompute):
    """Return the bytes that live from the forward to the backward pass beside weights, and the gradients."""
    options = ModelOptions(device=CPU, trainable=True, recompute=recompute)
    model = build_model(architecture(config), groups, options)
    draw_weights(model, 1)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        rows = model.rows(view(config["vocab_size"], samples=2, length=64))
    kept = sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
    rows.square().sum().backward()
    return kept, {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize(("config", "share"), [(DENSE, 0.65), (MIXTURE, 0.55)], ids=["dense", "mixture"])
def test_less_is_kept_and_every_gradient_is_the_same(groups, config, share):
    whole, expected = kept_and_gradients(groups, config, False)
    for recompute, most in (("selective", share), (True, 0.15)):
        kept, gradients = kept_and_gradients(groups, config, recompute)
        print(f"{config['model_type']}, recompute={recompute}: {kept / whole:.3f} of {whole} bytes kept")
        assert kept < most * whole
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], slope) for name, slope in expected.items())
