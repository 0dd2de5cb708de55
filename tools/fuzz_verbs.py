"""Give every verb of `tide` seeded odd inputs, and see that each answers with one message, in time, cleanly.

    python tools/fuzz_verbs.py                       (300 inputs a verb; about an hour on two cores)
    python tools/fuzz_verbs.py --cases 10            (what `make test` does)
    python tools/fuzz_verbs.py --verbs export --cases 40 --seed 7

A word of its command line is odd, or one file that it reads is spoilt: taken away, replaced by a folder, a
link or a pipe, cut, emptied, written in another encoding, filled with zeros or noise, made enormous; or,
where it is JSON or YAML, one of its values becomes another type. Where digests stand beside it, half of the
time they are written anew.
The verb then runs in a process forked from this one, which has imported
everything. It may succeed, where what was spoilt does not matter; else it must end with exit code 2, one
message that begins with `error:` (or the usage of the command line), and no traceback; and nothing
half-written may be left beside its target. Everything else is a finding, printed with its number, and the
exit code is then 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from tide_megatron.platform import prepare_platform

import torch
import yaml

import tide_megatron
from spoil import digest_anew, spoil_bytes, spoil_value, spoil_words
from tide_megatron import commands

ROOT = Path(__file__).resolve().parents[1]
STUDENT = ROOT / "examples/quickstart/models/student"
CHATS = ROOT / "examples/first_run/chats.jsonl"
SECONDS = 60.0
"""A case may take so long; nearly all take less than two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb as it is tried."""

    words: Callable[[Path], Sequence[str]]
    """Command line in a copy of the fixtures; what it writes is called `out`."""
    files: Sequence[str] = ()
    """What it reads, below the fixtures: the files that are spoilt."""
    takes_keys: bool = False
    """Does it take `KEY=VALUE`, and do nothing long with it?"""


MODEL_FILES = [
    f"model/{name}"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
]
DATA_FILES = [
    f"data/{name}" for name in ("manifest.json", "ids.bin", "ids.idx", "replies.bin", "reply_bytes.idx")
]
STEP = "run/checkpoints/step-00000002-000000000008"
RUN_FILES = [
    f"{STEP}/{name}" for name in (".metadata", "common.pt", "metadata.json", "state.json", "__0_0.distcp")
]
RUN_FILES += ["run/recipe.yaml", "run/checkpoints/latest"]
MEGATRON_FILES = [
    f"megatron/release/{name}" for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp")
]
MEGATRON_FILES += ["megatron/latest_checkpointed_iteration.txt", "megatron/hf/config.json"]
VERBS = {
    "prepare": Verb(
        words=lambda at: [
            "prepare",
            f"{at}/out",
            f"{at}/chats.jsonl",
            "--tokenizer",
            f"{at}/model",
            "--max-length",
            "96",
        ],
        files=["chats.jsonl", *MODEL_FILES[1:3]],
    ),
    "train": Verb(
        words=lambda at: ["train", f"{at}/run.yaml", f"folder={at}/out", "steps=1"],
        files=["run.yaml", *MODEL_FILES, *DATA_FILES],
    ),
    "train --dry-run": Verb(
        words=lambda at: ["train", f"{at}/run.yaml", f"folder={at}/out", "--dry-run"],
        files=["run.yaml", *MODEL_FILES, *DATA_FILES],
        takes_keys=True,
    ),
    "train (resume)": Verb(
        words=lambda at: ["train", f"{at}/run.yaml", f"folder={at}/run", "steps=3"],
        files=RUN_FILES,
    ),
    "sample": Verb(
        words=lambda at: [
            "sample",
            f"{at}/model",
            "Return one.",
            "--new-tokens",
            "16",
            "--steps",
            "4",
            "--device",
            "cpu",
        ],
        files=[*MODEL_FILES, "model/tide_context.json"],
    ),
    "evaluate": Verb(
        words=lambda at: [
            "evaluate",
            f"{at}/model",
            "--data",
            f"{at}/data",
            "--samples",
            "4",
            "--device",
            "cpu",
        ],
        files=[*MODEL_FILES, *DATA_FILES, "model/tide_context.json"],
    ),
    "export": Verb(
        words=lambda at: ["export", f"{at}/run", f"{at}/out", "--format", "qwen3", "--no-verify"],
        files=[
            "run/model/config.json",
            "run/model/model.safetensors",
            "run/model/tokenizer.json",
            "run/result.json",
        ],
    ),
    "convert hf-to-megatron": Verb(
        words=lambda at: ["convert", "hf-to-megatron", f"{at}/model", f"{at}/out"],
        files=MODEL_FILES,
    ),
    "convert megatron-to-hf": Verb(
        words=lambda at: ["convert", "megatron-to-hf", f"{at}/megatron", f"{at}/out"],
        files=MEGATRON_FILES,
    ),
    "checkpoint verify": Verb(words=lambda at: ["checkpoint", "verify", f"{at}/run"], files=RUN_FILES),
    "checkpoint inspect": Verb(words=lambda at: ["checkpoint", "inspect", f"{at}/run"], files=RUN_FILES),
    "checkpoint diff": Verb(
        words=lambda at: ["checkpoint", "diff", f"{at}/run", f"{at}/run"],
        files=RUN_FILES,
    ),
    "model add-mask": Verb(
        words=lambda at: ["model", "add-mask", f"{at}/maskless", f"{at}/out"],
        files=[
            f"maskless/{name}"
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
        ],
    ),
    "recipe": Verb(words=lambda at: ["recipe", "optimizer"]),
    "doctor": Verb(words=lambda at: ["doctor", "--device", "cpu"]),
}


def make_fixtures(at: Path) -> None:
    """Make, by the verbs themselves, everything that they read."""
    shutil.copytree(STUDENT, at / "model")
    shutil.copy(CHATS, at / "chats.jsonl")
    run = {
        "folder": str(at / "run"),
        "steps": 2,
        "student": {
            "folder": str(at / "model"),
            "context": {"kind": "block_diffusion", "block_size": 16},
        },
        "data": {"train": str(at / "data"), "held_out": str(at / "data")},
        "batch": {"samples": 4},
        "losses": {"ce": {"kind": "cross_entropy"}},
        "evaluation": {"samples": 4},
        "metrics": {"tensorboard": False},
        "device": "cpu",
    }
    (at / "run.yaml").write_text(yaml.safe_dump(run))
    maskless(at / "model", at / "maskless")
    for words in (
        ["prepare", f"{at}/data", f"{at}/chats.jsonl", "--tokenizer", f"{at}/model", "--max-length", "128"],
        ["train", f"{at}/run.yaml"],
        ["convert", "hf-to-megatron", f"{at}/model", f"{at}/megatron"],
    ):
        code, text, _ = forked(words, at / "log", SECONDS)
        if code:
            raise SystemExit(f"tide {' '.join(words)}: exit code {code}\n{text}")


def maskless(model: Path, at: Path) -> None:
    """Copy a model folder whose mask token has become another special token."""
    shutil.copytree(model, at)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (at / name).read_text(encoding="utf-8")
        (at / name).write_text(text.replace("<|mask|>", "<|spare|>"), encoding="utf-8")
    config = json.loads((at / "tokenizer_config.json").read_text())
    config.pop("mask_token", None)
    (at / "tokenizer_config.json").write_text(json.dumps(config))


def forked(words: Sequence[str], log: Path, seconds: float) -> tuple[int, str, float]:
    """Run `tide` in a fork; return its exit code (minus a signal's number), what it said, and seconds."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115 - as Python's own
            os.chdir(log.parent)  # where words that name no whole path lead
            sys.argv = ["tide", *words]
            commands.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > seconds:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(status)
    return code, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - began


def findings(words: Sequence[str], at: Path, code: int, text: str, seconds: float) -> list[str]:
    """Return what is wrong with how a verb ended."""
    found = []
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if seconds > SECONDS:
        found.append(f"took longer than {SECONDS:.0f} s")
    elif code not in (0, 1, 2):
        found.append(f"exit code {code}")
    if "Traceback (most recent call last)" in text:
        found.append("a traceback")
    if code == 2 and len(errors) != 1 and "Usage: " not in text:
        found.append(f"{len(errors)} messages")
    if code == 1 and words[0] != "checkpoint" and not errors:
        found.append("exit code 1 without a message")
    hidden = [path.name for path in at.iterdir() if path.name.startswith(".")]
    left = [name for name in hidden if not name.endswith(".converting")]  # these go on where they stopped
    if left:
        found.append(f"left behind: {', '.join(left)}")
    has_begun = (
        words[0] == "train" and (at / "out/metrics.jsonl").is_file()
    )  # what failed later stays to be seen
    if code and not has_begun and (at / "out").exists() and any((at / "out").iterdir()):
        found.append("a target that failed and is there")
    return found


def run_case(
    verb: Verb, fixtures: Path, at: Path, chance: random.Random
) -> tuple[str, int, float, list[str]]:
    """Try one input; return what was spoilt, the exit code, seconds, and what is wrong."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(fixtures, at, symlinks=True, ignore=shutil.ignore_patterns("log"))
    for file in ("run.yaml", "run/recipe.yaml"):
        (at / file).write_text((at / file).read_text().replace(str(fixtures), str(at)))
    words = verb.words(at)
    if not verb.files or chance.random() < 0.2:
        words, told = spoil_words(words, verb.takes_keys, at, chance)
    else:
        told = _spoil_file(at / chance.choice([name for name in verb.files if (at / name).is_file()]), chance)
    code, text, seconds = forked(words, at.with_name("log"), SECONDS)
    wrong = findings(words, at, code, text, seconds)
    if wrong:
        wrong.append("\n".join(text.splitlines()[-12:]))
    return told, code, seconds, wrong


def _spoil_file(file: Path, chance: random.Random) -> str:
    told = spoil_value(file, chance) if chance.random() < 0.5 else None
    told = told or spoil_bytes(file, chance)
    if chance.random() < 0.5 and digest_anew(file):
        told += ", its digest written anew"
    return f"{file.name}: {told}"


def import_everything() -> None:
    """Import here, once, what verbs import when they are called; in every fork it takes longer than they."""
    for module in pkgutil.walk_packages(tide_megatron.__path__, "tide_megatron."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in (
        "torch._dynamo",
        "transformers.models.qwen3",
        "transformers.models.auto",
        "tokenizers",
        "numpy.ma",
    ):
        importlib.import_module(name)


def main() -> None:
    """Parse, try, print a table, and end with exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=300, help="inputs a verb")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="this input's number only")
    parser.add_argument("--verbs", nargs="*", default=list(VERBS), choices=list(VERBS), metavar="VERB")
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    prepare_platform()
    import_everything()
    is_bad = False
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "fixtures").mkdir()
        make_fixtures(at / "fixtures")
        print(f"{'verb':24}{'inputs':>8}{'accepted':>10}{'refused':>9}{'findings':>10}{'slowest':>9}")
        for name in given.verbs:
            codes: collections.Counter[int] = collections.Counter()
            slowest, bad = 0.0, 0
            for number in range(given.cases) if given.only is None else [given.only]:
                chance = random.Random(f"{given.seed}/{name}/{number}")
                told, code, seconds, wrong = run_case(VERBS[name], at / "fixtures", at / "case", chance)
                codes[code] += 1
                slowest, bad = max(slowest, seconds), bad + bool(wrong)
                if wrong:
                    print(f"- {name} {number}: {told} -> " + "; ".join(wrong), file=sys.stderr, flush=True)
            refused = sum(codes.values()) - codes[0]
            print(
                f"{name:24}{sum(codes.values()):8}{codes[0]:10}{refused:9}{bad:10}{slowest:8.1f}s", flush=True
            )
            is_bad |= bad > 0
    sys.exit(is_bad)


if __name__ == "__main__":
    main()
