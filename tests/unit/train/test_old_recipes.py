"""Recipes and run folders of an earlier release mean what they meant, which `old_recipes.yaml` says."""

from pathlib import Path

import pytest
import yaml

from tide_megatron.train.resolve import build_recipe, digest, load_recipe

OLD = yaml.safe_load((Path(__file__).parent / "old_recipes.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", OLD)
def test_an_old_recipe_has_the_digest_it_had(name, tmp_path):
    given = OLD[name]["given"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(OLD[given]["given"] if isinstance(given, str) else given))
    assert digest(load_recipe(file, OLD[name].get("words", []))[1]) == OLD[name]["digest"]


def test_what_an_old_run_folder_keeps_is_read_whole():
    """Nothing is lost: keys added since may stand beside, at their defaults."""
    kept = OLD["every key"]["resolved"]
    found = build_recipe(kept)[1]
    assert digest(found) == digest(kept) == OLD["every key"]["digest"]
    assert part_of(found, kept) == kept


def part_of(tree, like):
    """Return the keys of a tree that another has."""
    return {
        key: part_of(tree[key], value) if isinstance(value, dict) else tree[key]
        for key, value in like.items()
        if key in tree
    }
