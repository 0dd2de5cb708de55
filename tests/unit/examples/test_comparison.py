"""What the examples compare: variants are recipes, baselines have no teacher, tables say what was found."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tide_megatron.parallel.layout import Layout
from tide_megatron.train.resolve import difference, load_recipe

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


LAYOUTS = {"self": Layout(), "moe": Layout(expert=4), "dense": Layout(tensor=2, pipeline=2)}
UNTAUGHT = (
    *("undistilled", "hard_twin", "whole_hiding", "pair_twin"),
    *("undistilled_clean", "hard_twin_clean"),
)
PAIR = ["moe", "dense"]
TEACHERS = {"self": ["self"], "both": PAIR, "pair": PAIR, "distilled": PAIR, "dense": ["dense"]}
"""First part of a variant's name -> its teachers, where it is not the mixture alone."""


@pytest.mark.parametrize("example", ["quickstart", "cross_tokenizer", "shared_tokenizer", "exercises"])
def test_every_variant_is_a_recipe_and_differs_in_nothing_but_what_it_compares(load, example):
    script = load(f"{example}/run")
    file = "quickstart" if example == "shared_tokenizer" else example
    variants = {**getattr(script, "QUICK", getattr(script, "RUNS", {})), **script.FULL}
    trees = {}
    for name, words in variants.items():
        recipe, trees[name] = load_recipe(Path(f"configs/runs/{file}.yaml"), words)
        teachers = [] if name in UNTAUGHT else TEACHERS.get(name.partition("_")[0], ["moe"])
        assert {key: teacher.layout for key, teacher in recipe.teachers.items()} == {
            key: LAYOUTS[key] for key in teachers
        }
        assert [term.teacher for term in recipe.terms.values() if term.teacher] == teachers
        assert recipe.terms["ce"].weight == 1.0
        views = {key: teacher.view for key, teacher in recipe.teachers.items()}
        demonstrated = teachers[-1:] if "demo" in name else []  # of a pair, the one with the student's tokens
        assert {key for key, view in views.items() if view == "complementary"} == set(demonstrated)
        if example == "cross_tokenizer":
            assert recipe.noise.chunk_hiding == ("whole" if "whole" in name else "as_drawn")
        clean = "runs/exercises-data/train"
        assert (recipe.data.train == clean) == name.endswith("_clean")
    varied = ("losses", "teachers", "noise", *(["data"] if example == "exercises" else []))
    rest = [{key: value for key, value in tree.items() if key not in varied} for tree in trees.values()]
    assert all(tree == rest[0] for tree in rest)
    assert len({str(tree) for tree in trees.values()}) == len(trees)


def test_the_quickstart_shares_one_weight_among_teachers_and_gives_the_hard_twin_all_of_it(load):
    script = load("quickstart/run")
    terms = {
        name: load_recipe(Path("configs/runs/quickstart.yaml"), words)[0].terms
        for name, words in {**script.RUNS, **script.FULL}.items()
    }
    extra = {
        name: sum(term.weight for key, term in by_name.items() if key != "ce")
        for name, by_name in terms.items()
    }
    assert extra == {
        "undistilled": 0,
        "hard_twin": 8.0,
        "both": 8.0,
        "moe": 8.0,
        "dense": 8.0,
        "self": 8.0,
        "both_tidal": 16.0,
    }


def test_the_exercises_share_one_weight_too(load):
    script = load("exercises/run")
    terms = load_recipe(Path("configs/runs/exercises.yaml"), script.RUNS["distilled"])[0].terms
    assert sum(term.weight for key, term in terms.items() if key != "ce") == script.WEIGHT


def test_the_written_out_pair_is_the_example_s(load):
    script = load("cross_tokenizer/run")
    _, expected = load_recipe(Path("configs/runs/cross_tokenizer.yaml"), script.QUICK["pair"])
    _, written = load_recipe(Path("configs/runs/pair.yaml"))
    assert difference(expected, written) == ["folder: 'runs/cross_tokenizer/undistilled' -> 'runs/pair'"]


def test_notes_on_a_pair_hold_with_the_quick_variants_and_with_all(load):
    script = load("cross_tokenizer/run")
    module = sys.modules["comparison"]
    for variants in (script.QUICK, script.QUICK | script.FULL):
        first = {
            name: result(2.0 - index / 10 - (name in UNTAUGHT), [2.0 - index / 10, 2.1 - index / 9, 1.9])
            for index, name in enumerate(variants)
        }
        comparison = module.Comparison(
            title="t",
            recipe=Path("r"),
            out=Path("o"),
            held_out=Path("h"),
            teachers=(script.MOE, script.DENSE),
            variants=variants,
            matched="pair",
            references=("hard_twin", "undistilled", "whole_hiding"),
        )
        text = "\n".join(script.notes(comparison.summarise([first], (11,)), first))
        best = min(
            (name for name in variants if name not in UNTAUGHT), key=lambda name: first[name]["nll_per_byte"]
        )
        assert f"best taught student ({best})" in text
        assert ("from pair_twin (95" in text) == ("pair_twin" in variants)
        assert "from reverse_calm (95" in text


def result(score, samples):
    return {
        "nll_per_byte": score,
        "masked_accuracy": 0.25,
        "cpu_seconds": 30.0,
        "clock": {"step": 300},
        "sample_nll_per_byte": samples,
    }


def test_summaries_take_differences_to_every_untaught_run_and_keep_the_seeds(load, tmp_path):
    module = load("quickstart/comparison")
    comparison = module.Comparison(
        title="t",
        recipe=Path("r"),
        out=tmp_path,
        held_out=tmp_path,
        teachers=(),
        variants={"undistilled": [], "hard_twin": ["a=1"], "calm": ["b=2"]},
        matched="calm",
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


def test_an_undistilled_run_is_given_the_distilled_one_s_cpu_time(load, tmp_path):
    module = load("quickstart/comparison")
    comparison = module.Comparison(
        title="t",
        recipe=Path("configs/runs/quickstart.yaml"),
        out=tmp_path,
        held_out=tmp_path,
        teachers=(),
        variants={"undistilled": ["seed=3"], "hard_twin": [], "both": []},
        matched="both",
    )
    first = {name: result(2.0, [2.0, 2.2, 1.9]) for name in comparison.variants}
    first["both"] = result(1.9, [1.9, 2.0, 1.8]) | {"cpu_seconds": 75.0}
    assert comparison.longer(first) == ["seed=3", "steps=750"]
    longer = result(1.8, [1.8, 1.9, 1.8]) | {"clock": {"step": 750}, "cpu_seconds": 74.0}
    summary = comparison.summarise([{**first, module.LONGER: longer}], (11,))
    assert summary[module.LONGER]["steps"] == 750
    assert summary["both"]["differences"][module.LONGER]["mean"] == pytest.approx(0.2 / 3)
    (sentence, _) = comparison.cautions(summary)
    assert "750 steps in place of 300" in sentence
    assert "both is 0.0667 nats/byte worse (95 % interval" in sentence
