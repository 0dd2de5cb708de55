"""Each story of CONTRIBUTING.md, done in a copy of the package and used there; its files are counted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.extension.uses import USES

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests/extension"
STORIES = yaml.safe_load((HERE / "stories.yaml").read_text(encoding="utf-8"))
ADDED_AND_CHANGED = {"architecture": (1, 1), "loss": (1, 1), "tokenizer": (1, 1), "chat template": (1, 0)}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def apply(story, root):
    """Do a story in a tree: add its files, put its lines into files that are there."""
    for path, source in story["adds"].items():
        assert not (root / path).exists()
        shutil.copy(HERE / source, root / path)
    for path, lines in story["changes"].items():
        text = (root / path).read_text(encoding="utf-8")
        for change in lines:
            anchor = f"{change['after']}\n"
            assert text.count(anchor) == 1, f"{path} has {anchor!r} {text.count(anchor)} times"
            text = text.replace(anchor, f"{anchor}{change['line']}\n")
        (root / path).write_text(text, encoding="utf-8")


def use(name, copy, folder):
    """Run a story's use where the copy is the package; return what it printed."""
    folder.mkdir()
    paths = os.pathsep.join(map(str, (copy, ROOT, ROOT / "tools")))
    command = [sys.executable, "-B", "-m", "tests.extension.uses", name, str(folder)]
    done = subprocess.run(
        command, cwd=copy, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def copy(tmp_path):
    """Return a folder that holds a copy of the package."""
    shutil.copytree(
        ROOT / "tide_megatron", tmp_path / "copy/tide_megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path / "copy"


@pytest.mark.parametrize("name", STORIES)
def test_a_story_takes_so_many_files(copy, tmp_path, name):
    before = content(copy)
    apply(STORIES[name], copy)
    status, said, fault = use(name, copy, tmp_path / "used")
    assert status == 0, fault
    assert said.startswith(str(copy)), "another package was used"
    after = content(copy)
    added = {path for path in after if path not in before}
    changed = {path for path, old in before.items() if after[path] != old}
    assert (len(added), len(changed)) == ADDED_AND_CHANGED[name]


def test_a_line_left_out_is_noticed(copy, tmp_path):
    """The use is of what the story adds: without the table's line it fails."""
    apply(STORIES["tokenizer"] | {"changes": {}}, copy)
    status, _, fault = use("tokenizer", copy, tmp_path / "used")
    assert status != 0
    assert "a tokenizer is a folder with" in fault


def test_every_story_is_used():
    assert set(STORIES) == set(USES) == set(ADDED_AND_CHANGED)
