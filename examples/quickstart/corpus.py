"""Build the quickstart's data: docstring -> function chats from Python sources that are already installed.

    python examples/quickstart/corpus.py OUT_DIR

writes `train.jsonl`, `dev.jsonl`, `test.jsonl` (one chat a line: the user asks with a docstring's first
line, the assistant answers with the function, its docstring removed) and `corpus.json` (counts, versions,
licences, digests).

What it reads: the standard library and the four packages that every installation of torch brings along
(torch, sympy, networkx, numpy); one that is missing is left out and said so. Tests, test tools and vendored
third-party folders are skipped. Two caps fit the pairs to a small model: the request is cut at a word to
REQUEST_BYTES, the function at a whole line to REPLY_BYTES. Functions whose text is equal after the cut are
kept once, so no reply of `test` occurs in `train`. A file goes to one split as a whole, chosen by a hash of
its name, so the same file lands in the same split under every version of the package. No random numbers are
drawn: equal sources give equal bytes.
"""

from __future__ import annotations

import ast
import collections
import concurrent.futures
import dataclasses
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sysconfig
import textwrap
import time
from pathlib import Path

import typer

REQUEST_BYTES = 40
REPLY_BYTES = 136
MIN_REPLY_BYTES = 24
LICENCES = {
    "stdlib": "PSF-2.0",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "externals"}
SKIPPED_PREFIXES = ("_vendor", "vendor", "_bundled", "third")
SPLITS = {"train": 900, "dev": 950, "test": 1000}
"""Upper ends on a scale of 1000: files hash to 90 % train, 5 % dev, 5 % test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One request and its function."""

    source: str
    file: str
    request: str
    reply: str

    def chat(self) -> str:
        """Return the JSONL line."""
        messages = [{"role": "user", "content": self.request}, {"role": "assistant", "content": self.reply}]
        told = {"messages": messages, "source": self.source, "file": self.file}
        return json.dumps(told, ensure_ascii=False)


def find_sources() -> dict[str, Path]:
    """Return the root folder of every source in LICENCES that is installed."""
    roots = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for name in LICENCES.keys() - roots.keys():
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            roots[name] = Path(found.origin).parent
    return dict(sorted(roots.items()))


def list_files(root: Path) -> list[str]:
    """Return the relative names of all modules below `root`, sorted, without tests and vendored code."""
    kept = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)
        ]
        kept += [str(Path(folder, name).relative_to(root)) for name in names if name.endswith(".py")]
    return sorted(kept)


def cut_request(docstring: str) -> str:
    """Return the docstring's first line, cut at a word so that it has at most REQUEST_BYTES bytes."""
    words = docstring.strip().split("\n", 1)[0].split()
    request = ""
    for word in words:
        longer = f"{request} {word}".strip()
        if len(longer.encode()) > REQUEST_BYTES:
            break
        request = longer
    return request


def cut_reply(source: str) -> str:
    """Return a function's leading whole lines that fit in REPLY_BYTES bytes ('' if not even one does)."""
    kept: list[str] = []
    size = 0
    for line in source.split("\n"):
        size += len(line.encode()) + 1
        if size > REPLY_BYTES + 1:
            break
        kept.append(line)
    return "\n".join(kept).rstrip()


def extract(source: str, root: Path, file: str) -> list[Pair]:
    """Return the pairs of one module; a module that this Python cannot read or parse has none."""
    try:
        text = (root / file).read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return []
    lines = text.split("\n")
    pairs = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        statement = node.body[0]
        if not docstring or statement.end_lineno is None or statement.lineno == node.lineno:
            continue
        head = lines[node.lineno - 1 : statement.lineno - 1]
        body = "\n".join(lines[statement.end_lineno : node.end_lineno]).lstrip("\n")
        request = cut_request(docstring)
        reply = cut_reply(textwrap.dedent("\n".join([*head, body])).strip())
        if request and len(reply.encode()) >= MIN_REPLY_BYTES:
            pairs.append(Pair(source=source, file=file, request=request, reply=reply))
    return pairs


def split_of(source: str, file: str) -> str:
    """Return the split a file belongs to, whatever else is installed."""
    place = int.from_bytes(hashlib.sha256(f"{source}/{file}".encode()).digest()[:8], "big") % 1000
    return next(split for split, end in SPLITS.items() if place < end)


def gather(roots: dict[str, Path]) -> tuple[list[Pair], int]:
    """Return all pairs in a fixed order, each reply once, and the number of repeated replies left out."""
    files = [(source, root, file) for source, root in roots.items() for file in list_files(root)]
    # A syntax tree has no reference cycles: the cyclic collector would only walk it in vain (twice the time).
    workers = min(4, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=gc.disable) as pool:
        found = [
            pair for pairs in pool.map(extract, *zip(*files, strict=True), chunksize=32) for pair in pairs
        ]
    first = {pair.reply: pair for pair in reversed(found)}
    kept = [pair for pair in found if first[pair.reply] is pair]
    return kept, len(found) - len(kept)


def version_of(source: str) -> str:
    """Return the installed version of a source."""
    return platform.python_version() if source == "stdlib" else importlib.metadata.version(source)


def write_corpus(out: Path) -> dict[str, object]:
    """Write the three splits and `corpus.json` below `out`; return what `corpus.json` holds."""
    roots = find_sources()
    pairs, num_repeated = gather(roots)
    out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for pair in pairs:
        splits[split_of(pair.source, pair.file)].append(pair)
    card: dict[str, object] = {
        "request_bytes": REQUEST_BYTES,
        "reply_bytes": REPLY_BYTES,
        "repeated_replies_left_out": num_repeated,
        "sources": {
            source: {"version": version_of(source), "licence": LICENCES[source], "pairs": count}
            for source, count in sorted(collections.Counter(pair.source for pair in pairs).items())
        },
        "sources_missing": sorted(LICENCES.keys() - roots.keys()),
        "splits": {},
    }
    sizes: dict[str, object] = {}
    for name, members in splits.items():
        content = "".join(pair.chat() + "\n" for pair in members).encode()
        (out / f"{name}.jsonl").write_bytes(content)
        sizes[name] = {
            "pairs": len(members),
            "files": len({(pair.source, pair.file) for pair in members}),
            "reply_bytes": sum(len(pair.reply.encode()) for pair in members),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    card["splits"] = sizes
    (out / "corpus.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def main(out: Path) -> None:
    """Build the corpus below OUT and print its card."""
    start = time.perf_counter()
    card = write_corpus(out)
    typer.echo(json.dumps(card, indent=2))
    typer.echo(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    typer.run(main)
