"""The picture in docs/ is what its script draws, to a hundredth of a point."""

import re

import pytest

from draw_step import DENSE, MIXTURE, PICTURE, STUDENT, held, link, main

NUMBER = re.compile(r"-?\d+\.\d+")


def test_the_committed_picture_is_what_the_script_makes(tmp_path):
    main(tmp_path / "step.svg")
    drawn, committed = (path.read_text(encoding="utf-8") for path in (tmp_path / "step.svg", PICTURE))
    assert NUMBER.sub("#", drawn) == NUMBER.sub("#", committed), "python tools/draw_step.py"
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (drawn, committed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.01)
    assert len(committed) < 150_000


def test_what_it_says_of_the_ranks():
    assert [held(MIXTURE, rank).splitlines()[1] for rank in range(4)] == [
        f"expert {rank}" for rank in range(4)
    ]
    assert [held(DENSE, rank) for rank in (1, 2)] == [
        "stage 0: layers 0-1\nshard 2 of 2",
        "stage 1: layers 2-3\nshard 1 of 2",
    ]
    links = {model.folder: [link(model, rank) for rank in range(3)] for model in (STUDENT, MIXTURE, DENSE)}
    assert links == {"student": [""] * 3, "teacher": ["<->"] * 3, "dense": ["<->", "->", "<->"]}
