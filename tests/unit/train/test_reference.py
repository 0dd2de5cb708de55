"""docs/recipe.md is what the option classes say; every key has a meaning; `tide recipe` finds keys."""

from pathlib import Path

import pytest

from tide_megatron.base.errors import ConfigError
from tide_megatron.train.reference import as_markdown, explain, sections

PAGE = Path(__file__).parents[3] / "docs/recipe.md"


def test_the_page_is_current():
    assert PAGE.read_text() == as_markdown(), "run: tide recipe --markdown > docs/recipe.md"


def test_every_key_says_what_it_means():
    silent = [
        f"{section.key}.{option.name}"
        for section in sections()
        for option in section.options
        if not option.meaning and option.nested is None
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("optimizer.learning_rate", ["number; default 5e-05", "paper: 5e-5", "mathematics"]),
        ("teachers.wedlm.layout.tensor", ["whole number; default 1", "machine choice"]),
        ("head.form", ["fused or plain", "machine choice"]),
        ("steps", ["whole number; required", "mathematics"]),
        ("student.context.kind", ["block_causal", "required"]),
        ("losses.ce.normalization", ["(kind: cross_entropy)", "token or sequence"]),
        ("data.held_out", ["text or null; default null"]),
    ],
)
def test_a_key_is_explained(key, parts):
    found = explain(key)
    assert found.count("\n\n") == 0
    for part in parts:
        assert part in found


def test_the_beginning_of_keys_explains_all_under_it():
    assert explain("checkpoints").count("\n\n") == 5
    assert "jensen_shannon" in explain("losses.term.temperature")
    assert len(explain("")) > 5000


def test_a_key_that_is_none_names_the_nearest():
    with pytest.raises(ConfigError, match=r"^optimizer\.lerning_rate: no such key .*\.learning_rate"):
        explain("optimizer.lerning_rate")
