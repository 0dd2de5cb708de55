"""What README and docs/ say of the tree is so: packages of the map in the contract's order, pages, links."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tide_megatron"


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_map_is_the_tree_in_the_order_of_the_layer_contract():
    rows = re.findall(r"^\| \d \| (.*?) \|", text("README.md"), re.MULTILINE)
    mapped = re.findall(r"`(\w+)`", " ".join(rows))
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"api"}
    assert set(mapped) == packages
    contract = re.search(r"^layers = \[(.*?)\]", text("pyproject.toml"), re.MULTILINE | re.DOTALL)[1]
    level = {name: n for n, line in enumerate(re.findall(r'"(.*)"', contract)) for name in line.split(" | ")}
    assert [level[name] for name in mapped] == sorted((level[name] for name in mapped), reverse=True)


def test_every_page_is_in_the_index_and_links_to_pages_lead_somewhere():
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
    index = re.findall(r"^\| \[(\S+)\]", text("docs/README.md"), re.MULTILINE)
    assert sorted(index) == pages
    links = {
        f"docs/{target}"
        for page in ("README.md", *pages)
        for target in re.findall(r"\]\((\w+\.\w+)\)", text(f"docs/{page}"))
    }
    links |= set(re.findall(r"\]\((docs/[\w./]+)\)", text("README.md")))
    assert "docs/step.svg" in links
    assert [link for link in sorted(links) if not (ROOT / link).is_file()] == []


def test_every_variable_of_the_makefile_that_is_used_is_set():
    makefile = text("Makefile")
    used = set(re.findall(r"\$\((\w+)\)", makefile)) - {"MAKE"}
    assert used == set(re.findall(r"^(?:[\w-]+: )?(\w+) \??= ?", makefile, re.MULTILINE))


@pytest.mark.slow
def test_the_way_from_chats_to_an_export_is_as_its_page_says():
    commands = re.findall(r"^(tide .*)$", text("docs/first_student.md"), re.MULTILINE)
    assert len(commands) == 7
    shutil.rmtree(ROOT / "runs/page", ignore_errors=True)
    tool = str(Path(sys.executable).with_name("tide"))
    for command in commands:
        words = [tool, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (ROOT / "runs/page/exported").is_dir()
