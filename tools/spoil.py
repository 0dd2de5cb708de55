"""Spoil a file of a user's, at random and by a seed: what `fuzz_verbs.py` gives the verbs to read."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tide_megatron.base.files import digest_of
from tide_megatron.train.reference import sections

ENORMOUS_BYTES = 32 * 2**20
MAY_BE_PIPES = ("chats.jsonl", "run.yaml")
"""What a verb reads from a pipe if it is one, and then waits for its writer as it should."""
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**70,
    1e400,
    0.5,
    "",
    "x",
    "<|mask|>",
    "\ud800",
    [],
    [[]],
    {},
    {"a": None},
    ["x", 1],
)

ODD_WORDS: tuple[str, ...] = (
    "",
    " ",
    "-1",
    "0",
    "1e309",
    "nan",
    "null",
    "[",
    "{a: 1}",
    "a=b=c",
    "ü\udcff",
    "x" * 5000,
    "no/such/place",
)
ODD_WORDS += (
    "9" * 40,
    "--unknown",
    "-",
    "true",
    "é=1",
    "steps",
    "steps=",
    "=1",
    "losses={}",
    "teachers.x=null",
)


def spoil_words(
    words: Sequence[str], takes_keys: bool, at: Path, chance: random.Random
) -> tuple[list[str], str]:
    """Put an odd word in the place of one of a command line, or beside it; return it and what was done.

    Args:
        words: behind `tide`, the verb first.
        takes_keys: a key of the recipe may get an odd value.
        at: folder of the files; some of them are odd words as well.
        chance: chooses.
    """
    words = list(words)
    if takes_keys and chance.random() < 0.6:
        keys = [
            f"{section.key.partition(' ')[0]}.{option.name}".lstrip(".")
            for section in sections()
            for option in section.options
        ]
        key = chance.choice(keys).replace("TERM", "ce").replace("NAME", "t")
        words.append(f"{key}={json.dumps(chance.choice(ODD_VALUES))}")
        return words, words[-1]
    odd = chance.choice([*ODD_WORDS, f"{at}/model", f"{at}/chats.jsonl", f"{at}/run", f"{at}/data"])
    place = chance.randrange(1, len(words) + 1)
    told = f"{' '.join(words[:place])} {odd[:60]!r}"
    words[place : place + (chance.random() < 0.7)] = [odd]
    return words, told


def spoil_bytes(file: Path, chance: random.Random) -> str:
    """Spoil a file in one of the ways that need not know what it is; return what was done."""
    content, other = file.read_bytes(), file.with_name("elsewhere")

    def replace(write: Callable[[], object]) -> None:
        file.unlink()
        write()

    ways: dict[str, Callable[[], object]] = {
        "missing": file.unlink,
        "a folder": lambda: replace(file.mkdir),
        "a link to nothing": lambda: replace(lambda: file.symlink_to(other)),
        "a link to itself": lambda: replace(lambda: file.symlink_to(file)),
        "a pipe": lambda: replace(lambda: os.mkfifo(file)),
        "empty": lambda: file.write_bytes(b""),
        "cut": lambda: file.write_bytes(content[: chance.randrange(1, max(2, len(content)))]),
        "twice": lambda: file.write_bytes(content + content),
        "utf-16": lambda: file.write_bytes(content.decode("latin-1").encode("utf-16")),
        "latin-1": lambda: file.write_bytes(content[:40] + b"\xe4\xf6\xfc" + content[40:]),
        "zeros": lambda: file.write_bytes(b"\0" * len(content)),
        "noise": lambda: file.write_bytes(chance.randbytes(max(1, len(content)))),
        "a byte changed": lambda: file.write_bytes(_with_byte_changed(content, chance)),
        "enormous": lambda: os.truncate(file, len(content) + ENORMOUS_BYTES),
        "too deep": lambda: file.write_bytes(b"[" * 200_000),
    }
    if file.name in MAY_BE_PIPES:
        del ways["a pipe"]
    name = chance.choice(sorted(ways))
    ways[name]()
    return name


def digest_anew(file: Path) -> bool:
    """Write a spoilt file's digest as if it were meant so, where its folder has one; say whether it has."""
    digests = file.with_name("digests.json")
    if not digests.is_file() or not file.is_file():
        return False
    known = json.loads(digests.read_text())
    if file.name in known:
        size, found = digest_of(file)
        known[file.name] = {"bytes": size, "sha256": found}
        digests.write_text(json.dumps(known))
    return file.name in known


def _with_byte_changed(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(max(1, len(content)))
    return content[:place] + chance.randbytes(1) + content[place + 1 :]


def spoil_value(file: Path, chance: random.Random) -> str | None:
    """Put another type in the place of one value of a JSON or YAML file; None: it is neither."""
    if file.suffix not in (".json", ".jsonl", ".yaml"):
        return None
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        lines = text.splitlines()
        number = chance.randrange(len(lines))
        tree, told = _changed(json.loads(lines[number]), chance)
        lines[number] = json.dumps(tree)
        file.write_text("\n".join(lines) + "\n")
        return f"line {number + 1}: {told}"
    is_json = file.suffix == ".json"
    tree, told = _changed(json.loads(text) if is_json else yaml.safe_load(text), chance)
    file.write_text(json.dumps(tree) if is_json else yaml.safe_dump(tree), encoding="utf-8")
    return told


def _changed(tree: Any, chance: random.Random) -> tuple[Any, str]:
    """Return a copy with one value changed or one key taken out or added, and what was done."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any, str]] = []

    def walk(part: Any, path: str, depth: int) -> None:
        items = (
            part.items() if isinstance(part, dict) else enumerate(part[:20]) if isinstance(part, list) else ()
        )
        for key, value in list(items):
            places.append((part, key, f"{path}.{key}"))
            if depth < 3:
                walk(value, f"{path}.{key}", depth + 1)

    walk(tree, "", 0)
    part, key, path = chance.choice(places)
    value = chance.choice(ODD_VALUES)
    if isinstance(part, dict) and chance.random() < 0.15:
        del part[key]
        return tree, f"{path} taken out"
    if isinstance(part, dict) and chance.random() < 0.1:
        part[chance.choice(["", "unknown", "\u00e4", "__class__"])] = value
        return tree, f"a key added beside {path}: {value!r}"
    part[key] = value
    return tree, f"{path} = {value!r}"
