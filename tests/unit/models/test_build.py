"""Models: rows picked in order, the head, freezing, fresh weights, layouts refused."""

import dataclasses

import pytest
import torch

from tests.unit.models.shapes import CPU, DENSE, DREAM, LLADA, LLADA_MOE, MIXTURE, architecture, build, view
from tide_megatron.base.errors import ConfigError
from tide_megatron.models import weights
from tide_megatron.models.build import build_model, check_available
from tide_megatron.models.params import local_params
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights, hf_tensors, save_model
from tide_megatron.parallel.layout import Layout

UNTIED = {**DENSE, "tie_word_embeddings": False}


@pytest.mark.parametrize("config", [DENSE, MIXTURE])
def test_rows_are_picked_in_the_views_order(groups, config):
    model = build(config, groups)
    everything = view(config["vocab_size"], samples=3, length=10)
    with torch.no_grad():
        states = model.rows(everything)
        picked = torch.tensor([41, 3, 3, 59, 0, 20])
        some = model.rows(dataclasses.replace(everything, rows=picked))
        first = dataclasses.replace(everything, ids=everything.ids[:1], positions=everything.positions[:1])
        alone = model.rows(dataclasses.replace(first, rows=torch.arange(20)))
    torch.testing.assert_close(some, states[picked], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, states[:20], rtol=1e-5, atol=1e-6)


def test_the_final_norm_is_applied(groups):
    states = build(DENSE, groups).rows(view(61))
    torch.testing.assert_close(states.pow(2).mean(dim=-1), torch.ones(len(states)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("config", [DENSE, MIXTURE])
def test_the_last_feed_forward_works_on_asked_rows_only(groups, config):
    model = build(config, groups)
    worked_on = []
    for layer in model.decoder.layers:
        layer.mlp.register_forward_hook(
            lambda module, given, answer: worked_on.append(tuple(given[0].shape[:2]))
        )
    asked = dataclasses.replace(
        view(config["vocab_size"], samples=3, length=10), rows=torch.tensor([5, 59, 5])
    )
    model.rows(asked)
    assert worked_on == [(20, 3)] * (len(worked_on) - 1) + [(3, 1)]


def test_no_rows_is_no_trouble(groups):
    model = build(MIXTURE, groups, trainable=True)
    nothing = dataclasses.replace(view(67), rows=torch.empty(0, dtype=torch.int64))
    states = model.rows(nothing)
    assert states.shape == (0, 32)
    states.sum().backward()


@pytest.mark.parametrize(("config", "name"), [(DENSE, "embedding.word_embeddings"), (UNTIED, "output_layer")])
def test_the_head_is_the_embedding_where_tied(groups, config, name):
    model = build(config, groups)
    assert model.head_weight is model.get_parameter(f"{name}.weight")
    assert model.head_weight.shape == (61, 32)


def test_frozen_and_trainable(groups):
    frozen, trained = build(MIXTURE, groups), build(MIXTURE, groups, trainable=True)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.rows(view(67)).requires_grad
    assert trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert trained.config.calculate_per_token_loss, "DDP must sum"


def test_every_weight_gets_a_gradient(groups):
    for config in (DENSE, UNTIED, MIXTURE, LLADA, LLADA_MOE, {**DREAM, "initializer_range": 0.2}):
        model = build(config, groups, trainable=True)
        (model.rows(view(config["vocab_size"], samples=8)) @ model.head_weight.T).pow(2).mean().backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not silent


def test_fresh_weights_follow_seed_and_name(groups):
    first, again, other = (build(MIXTURE, groups, seed=seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in first.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        assert torch.equal(tensor, again[name])
        if name.endswith("layernorm.weight"):
            assert tensor.eq(1).all()
        elif name.endswith("expert_bias"):
            assert tensor.eq(0).all()
        else:
            assert not torch.equal(tensor, other[name])
            assert tensor.std().item() == pytest.approx(0.02, rel=0.15)
    assert not torch.equal(
        first["decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"],
        first["decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"],
    )


def test_the_first_layers_may_be_dense(groups):
    model = build(MIXTURE, groups)
    kinds = [type(layer.mlp).__name__ for layer in model.decoder.layers]
    assert kinds == ["MLP", "MoELayer", "MoELayer"]


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "expert_tensor"])
def test_layouts_of_later_issues_are_refused(groups, axis):
    options = ModelOptions(device=CPU, layout=Layout(**{axis: 2}), trainable=True)
    with pytest.raises(ConfigError, match=rf"layout\.{axis}: 2 is not available yet"):
        build_model(architecture(MIXTURE), groups, options)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"attention_bias": False, "qk_norm": True}])
def test_wedlm_switches_build(groups, changes):
    config = {**DENSE, "model_type": "wedlm", **changes}
    model = build(config, groups, trainable=True)
    names = dict(model.named_parameters())
    bias = names.get("decoder.layers.0.self_attention.linear_qkv.bias")
    assert (bias is not None) == changes.get("attention_bias", True)
    assert ("decoder.layers.0.self_attention.q_layernorm.weight" in names) == changes.get("qk_norm", False)
    if bias is not None:
        assert bias.eq(0).all()
        before = model.rows(view(61))
        bias.data += 1.0
        assert not torch.allclose(before, model.rows(view(61)))


def test_a_table_that_forgets_a_weight_is_our_bug(groups, monkeypatch):
    model = build(DENSE, groups)
    mappings = list(local_params(model.architecture, model.shard))
    monkeypatch.setattr(weights, "local_params", lambda *_, **__: mappings[:-1])
    with pytest.raises(AssertionError, match=r"forgets \['decoder\.final_layernorm\.weight'\]"):
        draw_weights(model, 0)


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "expert_tensor"])
def test_frozen_models_take_every_axis(axis):
    check_available(Layout(**{axis: 2}))


@pytest.mark.parametrize("config", [DENSE, UNTIED, MIXTURE])
def test_a_frozen_model_holds_only_its_slice_of_the_head(groups, config):
    whole = build(config, groups)
    sliced = build_model(architecture(config), groups, ModelOptions(device=CPU, head=(5, 9)))
    draw_weights(sliced, 1)
    assert torch.equal(sliced.head_weight, whole.head_weight[5:9])
    assert sliced.head_start == 5
    assert whole.head_start == 0
    own = dict(sliced.named_parameters())
    assert ("output_layer.weight" in own) == (config is not DENSE)
    assert torch.equal(sliced.rows(view(61)), whole.rows(view(61)))
    if config is DENSE:
        assert sliced.head_weight.data_ptr() == own["embedding.word_embeddings.weight"][5:].data_ptr()


def test_a_folder_is_written_from_whole_models_only(groups, tmp_path):
    sliced = build_model(architecture(UNTIED), groups, ModelOptions(device=CPU, head=(5, 9)))
    with pytest.raises(AssertionError, match="cut over expert ranks alone"):
        save_model(sliced, tmp_path / "m")
    with pytest.raises(AssertionError, match="keeps its head whole"):
        build_model(architecture(UNTIED), groups, ModelOptions(device=CPU, head=(5, 9), trainable=True))
    with pytest.raises(AssertionError, match="is a part of"):
        hf_tensors(sliced, dict(sliced.named_parameters()))


@pytest.mark.parametrize("kind", ["bidirectional", "block_causal", "block_diffusion"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_shifted_model_answers_with_the_state_before(groups, kind, trainable):
    shifted, plain = (
        build_model(
            dataclasses.replace(architecture(DREAM), is_shifted=is_shifted),
            groups,
            ModelOptions(device=CPU, trainable=trainable),
        )
        for is_shifted in (True, False)
    )
    for model in (shifted, plain):
        draw_weights(model, 3)
    seen = view(61, samples=2, length=24, kind=kind)
    states = plain.rows(seen).view(-1, 24, 32)  # [samples and parts, length, hidden]
    wanted = torch.cat([states[:, :1], states[:, :-1]], dim=1).flatten(0, 1)
    assert torch.equal(shifted.rows(seen), wanted)
    order = torch.randperm(len(wanted))[:17]
    some = dataclasses.replace(seen, rows=order)
    torch.testing.assert_close(shifted.rows(some), wanted[order], rtol=1e-6, atol=1e-6)
    assert shifted.rows(dataclasses.replace(seen, rows=order[:0])).shape == (0, 32)


def test_softmax_routers_weigh_by_shares_of_all_experts(groups):
    model = build(LLADA_MOE, groups)
    assert [type(layer.mlp).__name__ for layer in model.decoder.layers] == ["MLP", "MoELayer", "MoELayer"]
    router = model.decoder.layers[1].mlp.router
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weights, chosen = router.routing(logits)
    shares = logits.softmax(dim=-1)
    best = torch.zeros_like(shares).scatter(1, shares.topk(2).indices, 1.0)
    torch.testing.assert_close(weights, shares * best)
    assert torch.equal(chosen.bool(), best.bool())
    assert "decoder.layers.1.mlp.router.expert_bias" not in model.state_dict()
