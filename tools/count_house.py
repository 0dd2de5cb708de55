"""Count the house: its size, its doubles, and what a reader has to open to follow a step.

    python tools/count_house.py                    this tree
    python tools/count_house.py --ref GIT_REF      a commit, in a temporary worktree
    python tools/count_house.py --no-trace         only what can be counted without a run
    python tools/count_house.py --json FILE.json   the same figures as JSON, too
    python tools/count_house.py --extensions       files that each story of an extension touches

What a reader opens is measured, not estimated: a step of the paper's pair in small (a mixture with tokens of
its own by Reverse CALM, experts over four ranks; a dense model by TIDAL in complementary views, cut in two
stages of two tensor ranks) runs under Python's profiler, and a package file counts when a function of it was
called. Rank 0's and the other ranks' files are put together. Sections follow the phases that the step books
its time to, so a file may count in several:

  a batch        phase `data` before `train_step`: prepared columns to the rank's microbatches
  noise          phase `data` in `train_step`: noise, row facts, counts, the teachers' requests
  teacher        phase `teacher`, with the exchanges inside it: a request to the teacher's rows on every rank
  student        phase `student`: the student's own forward pass
  head           phases `exchange`, `head`, `backward`: rows of both to the gradient of the student
  rows, in all   teacher and head together: a teacher's rows to the gradient of the student's head

Only these names of the package are used: `base.phases.Phases`, `train_step`, the phases' names, the recipe.
A tree without them is counted without the trace.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import functools
import io
import itertools
import json
import os
import runpy
import sys
import tempfile
import tokenize
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich
import yaml
from rich.table import Table

from same_numbers import CE, CUT, ROOT, Run, Tree, checked_out, teacher

PACKAGE = "tide_megatron"
PARTS = (PACKAGE, "tests", "tools", "examples")
STORIES = Path("tests/extension/stories.yaml")
"""Story -> the files that it adds and changes; tests/test_extension.py shows that it needs no more."""
CRUMB = 60
"""Lines; a module may be as small, but not many may."""
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
NOT_CODE |= {tokenize.ENCODING, tokenize.ENDMARKER}
SECTIONS = ("a batch", "noise", "teacher", "student", "head")
PAIR = Run(
    ranks=4,
    recipe={
        "steps": 2,
        "teachers": {
            "own": teacher("own", context={"kind": "bidirectional"}, layout={"expert": 4}),
            "dense": teacher("dense", layout=CUT, view="complementary"),
        },
        "losses": CE
        | {
            "reverse_calm": {"kind": "reverse_calm", "teacher": "own", "temperature": 5.0},
            "tidal": {"kind": "tidal", "teacher": "dense", "weight": 16.0},
        },
    },
)


def count(root: Path) -> dict[str, Any]:
    """Count what stands in a tree."""
    sources = {part: sorted((root / part).rglob("*.py")) for part in PARTS}
    ours = _read(root)
    modules = [path for path in ours if not path.endswith("__init__.py")]
    tested = {path.stem.removeprefix("test_") for path in sources["tests"]}
    classes = [node for text in ours.values() for node in _classes(text)]
    return {
        "size": {part: _size(paths) for part, paths in sources.items()},
        "dataclasses": sum(map(_is_dataclass, classes)),
        "public classes": len({node.name for node in classes if not node.name.startswith("_")}),
        **doubles(root),
        "modules of at most 60 lines": [path for path in modules if ours[path].count("\n") <= CRUMB],
        "modules without a test file of their name": [
            path for path in modules if Path(path).stem not in tested
        ],
    }


def doubles(root: Path) -> dict[str, Any]:
    """Find names that the package gives twice.

    Returns:
        Public classes and file names (without ending) that stand more than once, each with its places; pairs
        of file names of which one is the other with one letter more or another.
    """
    classes, files = collections.defaultdict(list), collections.defaultdict(list)
    for path, text in _read(root).items():
        if not path.endswith("__init__.py"):
            files[Path(path).stem].append(path)
        for node in _classes(text):
            if not node.name.startswith("_"):
                classes[node.name].append(path)
    return {
        "public class names used twice": {name: found for name, found in classes.items() if len(found) > 1},
        "file names used twice": {name: found for name, found in files.items() if len(found) > 1},
        "file names a letter apart": [
            [one, other] for one, other in itertools.combinations(sorted(files), 2) if _one_letter(one, other)
        ],
    }


def _read(root: Path) -> dict[str, str]:
    """Return the package's files by their path in the tree."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def _size(paths: Sequence[Path]) -> dict[str, int]:
    texts = [path.read_text(encoding="utf-8") for path in paths]
    lines = sorted(text.count("\n") for text in texts)
    return {
        "files": len(texts),
        "lines": sum(lines),
        "lines of code": sum(map(_code_lines, texts)),
        "median file": lines[len(lines) // 2] if lines else 0,
    }


def _code_lines(text: str) -> int:
    """Count the lines that hold code: neither blank, nor comment, nor docstring."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            held.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(held)


def _classes(text: str) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef))


def _is_dataclass(node: ast.ClassDef) -> bool:
    calls = [mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list]
    names = [call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls]
    return "dataclass" in names


def _one_letter(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    if len(short) == len(long):
        return sum(a != b for a, b in zip(short, long, strict=True)) == 1
    return any(long[:place] + long[place + 1 :] == short for place in range(len(long)))


# --- What a reader opens ---------------------------------------------------------------------------


class Watch:
    """A profiler that notes which functions of the package run in which section of a step."""

    def __init__(self, package: Path) -> None:
        """Start with nothing seen; the package is where its files are."""
        self.found: dict[str, set[tuple[str, str]]] = {name: set() for name in SECTIONS}
        self._prefix = f"{package}{os.sep}"
        self._open: list[str] = []
        self._in_step = 0

    def section(self) -> str | None:
        """Return what runs now; None: nothing that is asked about."""
        names = self._open
        if not names:
            return None
        if names[-1] == "data":
            return "noise" if self._in_step else "a batch"
        if not self._in_step:
            return None
        for phase in ("teacher", "student"):
            if phase in names:
                return phase
        return "head" if names[-1] in ("exchange", "head", "backward") else None

    def __call__(self, frame: types.FrameType, event: str, argument: object) -> None:
        """Take one of the profiler's events."""
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self._prefix):
            return
        if code.co_name == "train_step":
            self._in_step += 1 if event == "call" else -1
        section = self.section()
        if event == "call" and section and code.co_name != "<module>":
            path = code.co_filename.removeprefix(self._prefix)
            self.found[section].add((path, f"{code.co_qualname}:{code.co_firstlineno}"))

    def listen(self, phases: type) -> None:
        """Hear which phase is open."""
        book: Callable[..., Any] = phases.__call__  # type: ignore[operator]

        @functools.wraps(book)
        @contextlib.contextmanager
        def heard(timer: Any, name: str) -> Iterator[None]:
            with book(timer, name):
                self._open.append(name)
                try:
                    yield
                finally:
                    self._open.pop()

        phases.__call__ = heard  # type: ignore[assignment, method-assign]


def watch_rank(recipe: str, out: Path) -> None:
    """Be one rank of a run under the profiler; torchrun has started this process."""
    import tide_megatron.platform

    from tide_megatron.base.phases import Phases

    assert tide_megatron.__file__, "the package has files"
    watch = Watch(Path(tide_megatron.__file__).parent)
    watch.listen(Phases)
    sys.argv = ["tide", "train", recipe]
    sys.setprofile(watch)
    with contextlib.suppress(SystemExit):
        runpy.run_module("tide_megatron.commands", run_name="__main__")
    sys.setprofile(None)
    found = {name: sorted(calls) for name, calls in watch.found.items()}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


def trace(source: Path, work: Path) -> dict[str, Any] | None:
    """Run the pair in a tree under the profiler; return files and functions by section, None if it cannot."""
    tree = Tree(source, work)
    tree.prepare()
    tree.write("pair", PAIR)
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PAIR.ranks}"]
    try:
        tree.python(*ranks, str(Path(__file__)), "--be-a-rank", "pair.yaml", folder=tree.work)
    except SystemExit as fault:
        print(f"no trace: {fault}", file=sys.stderr)
        return None
    calls: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)
    for file in sorted(tree.work.glob("rank*.json")):
        for name, found in json.loads(file.read_text(encoding="utf-8")).items():
            calls[name].update(map(tuple, found))
    calls["rows, in all"] = calls["teacher"] | calls["head"]
    return {
        name: {"functions": len(found), "files": sorted({path for path, _ in found})}
        for name, found in calls.items()
    }


# --- Saying it -------------------------------------------------------------------------------------


def show(figures: dict[str, Any], *, lists: bool) -> None:
    """Print the figures, with the files of each section where they are wanted."""
    sizes = Table("", "files", "lines", "of code", "median file", box=None)
    for part, size in figures["size"].items():
        sizes.add_row(part, *map(str, size.values()))
    rich.print(sizes)
    print(f"dataclasses {figures['dataclasses']}, public classes {figures['public classes']}")
    for what in ("public class names used twice", "file names used twice"):
        print(f"{what}: {len(figures[what])}")
        for name, found in figures[what].items():
            print(f"  {name}: {' '.join(found)}")
    for what in ("modules of at most 60 lines", "modules without a test file of their name"):
        print(f"{what}: {len(figures[what])}")
        if lists:
            print("".join(f"  {path}\n" for path in figures[what]), end="")
    near = figures["file names a letter apart"]
    print(f"file names a letter apart: {len(near)} {' '.join('/'.join(pair) for pair in near)}")
    for name, found in (figures.get("opened") or {}).items():
        print(f"opened for {name}: {len(found['files'])} files, {found['functions']} functions")
        if lists:
            print("".join(f"  {path}\n" for path in found["files"]), end="")


def show_extensions(root: Path) -> None:
    """Print the files that each story touches, as the tree's own table has them."""
    file = root / STORIES
    if not file.is_file():
        print(f"no {STORIES} in this tree")
        return
    for story, touched in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        adds, changes = touched["adds"], touched["changes"]
        print(f"{story}: {len(adds) + len(changes)} files")
        print("".join(f"  new {path}\n" for path in adds), end="")
        print("".join(f"  changed {path} (+{len(lines)})\n" for path, lines in changes.items()), end="")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ref", metavar="GIT_REF", help="count this commit instead of the tree")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--no-trace", action="store_true", help="run nothing")
    parser.add_argument("--extensions", action="store_true", help="print the stories' files and stop")
    parser.add_argument("--be-a-rank", metavar="RECIPE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_a_rank:
        watch_rank(options.be_a_rank, Path.cwd())
        return
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(checked_out(options.ref)) if options.ref else ROOT
        if options.extensions:
            show_extensions(root)
            return
        figures = count(root)
        if not options.no_trace:
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix="count_house_"))
            figures["opened"] = trace(root, Path(work).resolve() / "run")
        show(figures, lists=True)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
