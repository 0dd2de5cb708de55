"""House rules that ruff, mypy, import-linter and deptry cannot hold; each is shown to see a planted fault.

A rule is a function from one parsed module to its faults. `make check` runs this file after the other tools.
The numbers are budgets: small files and functions keep every layer readable at once.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from count_house import doubles

ROOT = Path(__file__).parents[2]
PACKAGE, FOLDERS = "tide_megatron", ("tide_megatron", "tools", "examples", "tests")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_REPEATED_SHARE, WINDOW = 0.05, 6
MAX_CLASSES_TWICE, MAX_NAMES_A_LETTER_APART = 0, 5  # mask and task are both the words of the field
VAGUE_NAMES = {"utils", "helpers", "common", "misc", "manager"}
# Modules in megatron-core's layer-spec slots take what newer releases pass; stand-ins take what torch's do.
OPEN_SIGNATURES = {"models/attention.py", "models/spec.py", "models/quantized.py", "platform/cpu.py"}
# The one place that must name the golden files' keys.
GOLDEN_READERS = ("tools/replay_goldens.py", "tools/goldens/", "tests/golden/", "tests/unit/test_house.py")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A source file: its path from the root, its text, its tree."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def inside(self) -> str:
        """Path within the package; empty outside it."""
        return self.path.removeprefix(f"{PACKAGE}/") if self.path.startswith(f"{PACKAGE}/") else ""

    def nodes(self, *kinds: type) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def imports(self) -> Iterator[tuple[str, int]]:
        """Yield each imported module's full name and line, deferred ones too."""
        for node in self.nodes(ast.Import, ast.ImportFrom):
            if isinstance(node, ast.ImportFrom):
                yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)
            else:
                yield from ((name.name, node.lineno) for name in node.names)


def files_are_short(module: Module) -> Iterator[str]:
    lines = module.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines, more than {MAX_FILE_LINES}"


def functions_are_short(module: Module) -> Iterator[str]:
    for node in module.nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        lines = node.end_lineno - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}"


def names_say_what_is_inside(module: Module) -> Iterator[str]:
    vague = VAGUE_NAMES.intersection(Path(module.path).with_suffix("").parts)
    if vague:
        yield f"named {vague.pop()}, which says nothing"


def the_platform_is_prepared_before_megatron(module: Module) -> Iterator[str]:
    """In the package also for deferred imports; elsewhere these run where our code has run already."""
    if module.path.startswith(f"{PACKAGE}/platform/"):
        return
    at_import = {node.lineno for node in module.tree.body}
    for name, line in module.imports():
        if name.split(".")[0] == "megatron" and (module.inside or line in at_import):
            before = (other for other, earlier in module.imports() if earlier < line)
            if not any(other.startswith(f"{PACKAGE}.platform") for other in before):
                yield f"line {line}: import {PACKAGE}.platform before {name}"
            return


def public_signatures_are_closed(module: Module) -> Iterator[str]:
    if not module.inside or module.inside in OPEN_SIGNATURES:
        return
    for name, node in _definitions(module.tree):
        if isinstance(node, Function) and node.args.kwarg and _is_public(name.removesuffix(".__init__")):
            yield f"line {node.lineno}: {name} takes **{node.args.kwarg.arg}"


def the_papers_words_are_used(module: Module) -> Iterator[str]:
    if not module.path.startswith(GOLDEN_READERS):
        for number, line in enumerate(module.text.splitlines(), start=1):
            if re.search(r"(?<![a-z])(taid|alm)(?![a-z])", line, re.IGNORECASE):
                yield f"line {number}: say tidal, calm"


def assertions_speak(module: Module) -> Iterator[str]:
    if module.inside:
        yield from (f"line {n.lineno}: assert without message" for n in module.nodes(ast.Assert) if not n.msg)


RULES: tuple[Callable[[Module], Iterator[str]], ...] = (
    files_are_short,
    functions_are_short,
    names_say_what_is_inside,
    the_platform_is_prepared_before_megatron,
    public_signatures_are_closed,
    the_papers_words_are_used,
    assertions_speak,
)


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield classes, functions and methods with dotted names; not what is nested in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | Function):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions(node, prefix)


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


@functools.cache
def _modules(*folders: str) -> tuple[Module, ...]:
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return tuple(
        Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in found
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    faults = [f"{module.path}: {fault}" for module in _modules(*FOLDERS) for fault in rule(module)]
    assert not faults, "\n".join(faults)


def repeated_share(modules: tuple[Module, ...]) -> tuple[float, list[str]]:
    """Return the share of code lines that lie in a window of lines seen elsewhere too, and where."""
    files = {module.path: list(_code_lines(module)) for module in modules}
    windows = [
        (path, start, tuple(lines[start : start + WINDOW]))
        for path, lines in files.items()
        for start in range(len(lines) - WINDOW + 1)
    ]
    seen = Counter(window for _, _, window in windows)
    repeated = {(path, start + i) for path, start, w in windows if seen[w] > 1 for i in range(WINDOW)}
    places = [f"{path}: {window[0]}" for path, _, window in windows if seen[window] > 1]
    return len(repeated) / max(1, sum(map(len, files.values()))), places


def _code_lines(module: Module) -> Iterator[str]:
    for line in module.text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def test_little_is_said_twice():
    share, places = repeated_share(_modules("tide_megatron", "tools", "examples"))
    assert share <= MAX_REPEATED_SHARE, "\n".join([f"{share:.1%} repeated", *places])


def test_a_name_means_one_thing():
    """Budgets, to be lowered: nobody adds to what is there."""
    found = doubles(ROOT)
    assert len(found["public class names used twice"]) <= MAX_CLASSES_TWICE
    assert len(found["file names a letter apart"]) <= MAX_NAMES_A_LETTER_APART


LONG_FUNCTION = '"""Doc."""\ndef f():\n' + "    x = 1\n" * 60
PLANTED = [
    (files_are_short, "x = 1\n" * 401),
    (functions_are_short, LONG_FUNCTION),
    (the_platform_is_prepared_before_megatron, "import megatron.core\nimport tide_megatron.platform\n"),
    (public_signatures_are_closed, "def f(**options): ...\n"),
    (public_signatures_are_closed, "class A:\n    def __init__(self, **options): ...\n"),
    (the_papers_words_are_used, "taid" + "_alpha = 1\n"),
    (the_papers_words_are_used, "class Alm" + "Loss: ...\n".replace("Loss", "")),
    (assertions_speak, "assert 1\n"),
]


@pytest.mark.parametrize(("rule", "text"), PLANTED)
def test_rules_see_planted_faults(rule, text):
    assert list(rule(Module(f"{PACKAGE}/train/planted.py", text)))


def test_rules_see_planted_names_and_pass_good_ones():
    assert list(names_say_what_is_inside(Module(f"{PACKAGE}/utils/x.py", "")))
    assert list(names_say_what_is_inside(Module(f"{PACKAGE}/train/helpers.py", "")))
    good = '"""Doc."""\nimport tide_megatron.platform\nimport megatron.core\ncalm = 1\nassert calm, "why"\n'
    assert not [fault for rule in RULES for fault in rule(Module(f"{PACKAGE}/train/planted.py", good))]


def test_measures_see_planted_faults(tmp_path):
    for name in ("train/part.py", "train/parts.py", "head/bart.py"):
        (tmp_path / PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / name).write_text('"""Doc."""\n\nclass Part: ...\n')
    found = doubles(tmp_path)
    assert found["public class names used twice"]["Part"] == [
        f"{PACKAGE}/{name}" for name in ("head/bart.py", "train/part.py", "train/parts.py")
    ]
    assert found["file names a letter apart"] == [["bart", "part"], ["part", "parts"]]
    lines = [f"x{i} = {i}" for i in range(12)]
    one, two = Module("a.py", "\n".join(lines)), Module("b.py", "\n".join(lines[:6]) + "\ny = 1")
    assert repeated_share((one, two))[0] == pytest.approx(12 / 19)
    assert repeated_share((one,))[0] == 0.0


def unmirrored(root):
    """Return folders of unit tests that stand for no folder of the package, the tools or the examples."""
    unit = root / "tests/unit"
    places = {file.parent.relative_to(unit) for file in unit.rglob("test_*.py")}
    homes = (root / PACKAGE, root / "tools", root)
    return sorted(str(place) for place in places if not any((home / place).is_dir() for home in homes))


def test_unit_tests_mirror_folders(tmp_path):
    assert unmirrored(ROOT) == []
    for name in (f"{PACKAGE}/text", "tests/unit/text/old", "examples", "tests/unit/examples"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("text/old/test_a.py", "examples/test_b.py"):
        (tmp_path / "tests/unit" / name).write_text("")
    assert unmirrored(tmp_path) == ["text/old"]
