"""What the examples compare: variants are recipes, baselines have no teacher, tables say what was found."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tide_megatron.train.resolve import load_recipe

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def load(monkeypatch):
    """Load an example's script as a run of it would, from the repository's root."""

    def load_script(name):
        file = EXAMPLES / f"{name}.py"
        monkeypatch.chdir(EXAMPLES.parent)
        monkeypatch.syspath_prepend(str(EXAMPLES / "quickstart"))
        monkeypatch.syspath_prepend(str(file.parent))
        spec = importlib.util.spec_from_file_location(name.replace("/", "_"), file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load_script


@pytest.mark.parametrize("example", ["quickstart", "cross_tokenizer", "shared_tokenizer"])
def test_every_variant_is_a_recipe_and_differs_in_nothing_but_what_it_compares(load, example):
    script = load(f"{example}/run")
    file = "cross_tokenizer" if example == "cross_tokenizer" else "quickstart"
    variants = {**getattr(script, "QUICK", getattr(script, "RUNS", {})), **script.FULL}
    trees = {}
    for name, words in variants.items():
        recipe, trees[name] = load_recipe(Path(f"configs/runs/{file}.yaml"), words)
        taught = name not in ("undistilled", "hard_twin", "whole_hiding")
        assert [teacher.layout.expert for teacher in recipe.teachers.values()] == [4] * taught
        assert recipe.terms["ce"].weight == 1.0
        if "demo" in name:
            assert recipe.teachers["moe"].view == "complementary"
        if example == "cross_tokenizer":
            assert recipe.noise.chunk_hiding == ("whole" if "whole" in name else "as_drawn")
    varied = ("losses", "teachers", "noise")
    rest = [{key: value for key, value in tree.items() if key not in varied} for tree in trees.values()]
    assert all(tree == rest[0] for tree in rest)
    assert len({str(tree) for tree in trees.values()}) == len(trees)


def result(score, samples):
    return {
        "nll_per_byte": score,
        "masked_accuracy": 0.25,
        "cpu_seconds": 30.0,
        "sample_nll_per_byte": samples,
    }


def test_summaries_take_differences_to_every_untaught_run_and_keep_the_seeds(load, tmp_path):
    module = load("quickstart/comparison")
    comparison = module.Comparison(
        title="t",
        recipe=Path("r"),
        out=tmp_path,
        held_out=tmp_path,
        teacher=module.Teacher(folder=tmp_path, data=tmp_path),
        variants={"undistilled": [], "hard_twin": ["a=1"], "calm": ["b=2"]},
    )
    results = [
        {
            "undistilled": result(2.0 + shift, [2.0, 2.2, 1.8]),
            "hard_twin": result(1.9 + shift, [1.9, 2.0, 1.8]),
            "calm": result(1.5 + 2 * shift, [1.5, 1.7, 1.3]),
        }
        for shift in (0.0, 0.1, 0.2)
    ]
    summary = comparison.summarise(results, (11, 12, 13))
    assert summary["calm"]["words"] == ["b=2"]
    assert summary["calm"]["differences"]["undistilled"]["mean"] == pytest.approx(-0.5)
    assert summary["calm"]["differences"]["hard_twin"]["mean"] == pytest.approx(-0.4)
    assert summary["hard_twin"]["differences"]["undistilled"]["mean"] == pytest.approx(-0.1)
    assert [line["nll_per_byte"] for line in summary["seeds"] if line["name"] == "calm"] == pytest.approx(
        [1.5, 1.7, 1.9]
    )
    rows = {row[0]: row for row in module.seed_table(results, "undistilled").rows}
    assert rows["undistilled"][1:3] == ("2.1000 ± 0.1000", "reference")
    # Differences over seeds: -0.5, -0.4, -0.3; Student's quantile for two degrees of freedom is 4.3027.
    assert rows["calm"][1:4] == ("1.7000 ± 0.2000", "-0.4000 ± 0.2484", "25.0%")
    assert "seeds" not in comparison.summarise(results[:1], (11,))
