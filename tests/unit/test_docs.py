"""What README and docs/ say of the tree is so: packages of the map, in the order of the contract; pages; links."""

import re
from pathlib import Path

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


def test_every_page_is_in_the_index_and_links_lead_somewhere():
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
    index = re.findall(r"^\| \[(\S+)\]", text("docs/README.md"), re.MULTILINE)
    assert sorted(index) == pages
    for page in ["README.md", *(f"docs/{name}" for name in (*pages, "README.md"))]:
        for target in re.findall(r"\]\(([\w./]+)\)", text(page)):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
