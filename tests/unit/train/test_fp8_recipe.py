"""FP8 in a recipe: where it belongs, what is refused, how a run says what it does."""

import logging

import pytest

from tests.tiny_run import recipe_tree
from tests.unit.models.shapes import CPU, MIXTURE, architecture
from tests.unit.models.test_engine import H100
from tests.unit.train.test_resolve import changed
from tide_megatron.base.errors import ConfigError
from tide_megatron.models.precision import Fp8Options
from tide_megatron.parallel.layout import Layout
from tide_megatron.train.models import ModelShape, check_precision, tell_fp8
from tide_megatron.train.resolve import build_recipe, digest, mathematics


@pytest.fixture
def tree(tmp_path):
    return recipe_tree(tmp_path)


FP8 = [
    ({"student__fp8": {}}, r"^student\.fp8: .*only frozen teachers are held in FP8 \(teachers\.NAME\.fp8\)"),
    ({"student__precision": "fp8"}, r"^student\.precision: .*teachers\.NAME\.fp8"),
    (
        {"teachers__moe__fp8": {"recipe": "delayed"}},
        r"^teachers\.moe\.fp8\.recipe: .*gradients.*use rowwise",
    ),
    (
        {"teachers__moe__fp8": {"recipe": "mxfp8"}},
        r"^teachers\.moe\.fp8\.recipe: .*Blackwell.*use rowwise",
    ),
    ({"teachers__moe__fp8": {"recipe": "rows"}}, r"^teachers\.moe\.fp8\.recipe: 'rows'.*'rowwise'"),
    ({"teachers__moe__fp8": {"first_layers": -1}}, r"^teachers\.moe\.fp8\.first_layers: -1 "),
]


@pytest.mark.parametrize(("changes", "told"), FP8, ids=[str(changes) for changes, _ in FP8])
def test_fp8_where_it_does_not_belong_is_refused_with_its_reason(tree, changes, told):
    with pytest.raises(ConfigError, match=told) as refusal:
        build_recipe(changed(tree, **changes))
    assert len(str(refusal.value).splitlines()) == 1


def test_fp8_is_mathematics_and_its_absence_is_not_told(tree):
    plain, quantised = (build_recipe(changed(tree, **one))[1] for one in ({}, {"teachers__moe__fp8": {}}))
    assert quantised["teachers"]["moe"]["fp8"]["recipe"] == "rowwise"
    assert digest(plain) != digest(quantised)
    assert "fp8" not in mathematics(plain)["teachers"]["moe"]


def test_what_widths_do_not_allow_is_told_under_the_models_key(tree):
    wanted = changed(tree, teachers__moe__fp8={}, teachers__moe__precision="bf16")
    choice = build_recipe(wanted)[0].teachers["moe"]
    narrow = architecture({**MIXTURE, "moe_intermediate_size": 40})
    plan = ModelShape(key="teachers.moe", choice=choice, architecture=narrow, mask_id=0)
    with pytest.raises(ConfigError, match=r"^teachers\.moe\.fp8\.recipe: 'rowwise' on engine 'scaled' takes"):
        check_precision(plan, H100)
    check_precision(plan, CPU)


@pytest.mark.parametrize(
    ("recipe", "layout", "told"),
    [
        ("tensorwise", Layout(), ["an answer depends on its batchmates"]),
        ("rowwise", Layout(expert=4, pipeline=2), []),
        ("blockwise", Layout(tensor=2), ["each tensor rank finds FP8 scales of its own part"]),
        ("tensorwise", Layout(expert_tensor=2), ["on its batchmates", "scales of its own part"]),
    ],
    ids=str,
)
def test_a_run_says_what_a_recipe_makes_answers_depend_on(caplog, recipe, layout, told):
    with caplog.at_level(logging.INFO):
        tell_fp8("teachers.moe", Fp8Options(recipe=recipe), layout)
    assert len(caplog.messages) == len(told)
    assert all(word in said for word, said in zip(told, caplog.messages, strict=True))
