"""`make gpu-assets`: on a CPU machine, everything that `make gpu-check` needs on a machine with nothing.

    python -m gpu_check.assets --out .gpu --pack FOLDER

Writes data that the shipped models read (`data/`), what runs must give in fp32 on this CPU (`expected/`:
losses, per-parameter gradients, norms as JSON), a pack of packages where one is named (`pack/`), and
`assets.json`: commit, digest of the sources, seeds, versions. At most 45 MB, because only a checkout travels
to such a machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpu_check.identity import FILE, ROOT, commit_of, digest_of
from gpu_check.ranks import STEPS as RANK_STEPS
from gpu_check.ranks import run_world
from gpu_check.recorded import LAYOUTS, load_run, record_steps, write_record
from gpu_check.rows import Place, Row
from gpu_check.training import quickstart
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.text.tokenizer import Tokenizer

MOST_BYTES = 45 * 10**6
STUDENT = ROOT / "examples/quickstart/models/student"
OTHER = ROOT / "examples/cross_tokenizer/models/teacher"
MAX_LENGTH, OTHER_LENGTH = 96, 84
TRAINED, HELD_OUT = 3_600, 512
"""Samples of the real assets."""
SMALL = 48
"""Samples of a rehearsal's."""
PLAIN = ("attention=dense", "head.form=plain")
"""How everything is recorded: whole masks, the head by autograd."""
SEEDS = range(11, 31)
WORDS = ("steps=200", f"seed={SEEDS[0]}")
SMALL_WORDS = ("steps=2", "batch.samples=4", "evaluation.times=[0.5]", "metrics.every=1")
"""Of the quickstart's run, for a check and for a rehearsal."""
SMALLEST_GAP = 1e-5
"""Routers whose scores come closer may choose another expert on another device."""
PACK_FILES = ("MANIFEST.json", "README.md", "unpack.py", "check_pack.py")


def make_assets(out: Path, pack: Path | None) -> None:
    """Make the assets of a real check; an old folder is replaced at the end.

    Args:
        out: the folder.
        pack: a pack of packages, or None.

    Raises:
        SystemExit: they would be too large, or a router comes too close; with one sentence.
    """
    began = time.monotonic()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    sys.path.insert(0, str(ROOT / "examples/quickstart"))
    from corpus import write_corpus

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder)
        print("reading docstrings and functions from the installed sources ...", flush=True)
        write_corpus(text)
        train, test = (
            (text / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "test")
        )
        write_data(partial, _spread(train, TRAINED), _spread(test, HELD_OUT))
    _copy_pack(pack, partial)
    record_expected(partial, worlds=LAYOUTS, words=WORDS)
    size = _finish(partial)
    if size > MOST_BYTES:
        raise SystemExit(
            f"{partial}: {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}; name a smaller pack"
        )
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"{out}: {size / 1e6:.1f} MB in {time.monotonic() - began:.0f} s")


def make_small(place: Place) -> list[Row]:
    """Make the assets of a rehearsal in seconds, from this repository's own functions; as a check does."""
    out = place.assets
    sys.path.insert(0, str(ROOT / "examples/quickstart"))
    from corpus import extract

    files = sorted((ROOT / "tide_megatron/models").glob("*.py"))
    pairs = [pair for file in files for pair in extract("tide_megatron", file.parent, file.name)]
    lines = [pair.chat() for pair in pairs]
    write_data(out, lines[:SMALL], lines[SMALL : SMALL + 16])
    record_expected(out, worlds=(4,), words=SMALL_WORDS, steps=("steps=3",))
    size = _finish(out)
    return [Row(check="assets", text=f"a rehearsal's, {size / 1e6:.1f} MB")]


def _spread(lines: Sequence[str], number: int) -> list[str]:
    """Return some lines from all over a text."""
    return [lines[place * len(lines) // number] for place in range(number)]


def write_data(out: Path, train: Sequence[str], held_out: Sequence[str]) -> None:
    """Prepare chats, given as JSON lines: `data/pairs` in both tokenizers' tokens, `data/held_out`."""
    tokenizer = Tokenizer.load(STUDENT)
    side = SideChoice(tokenizer=Tokenizer.load(OTHER), max_length=OTHER_LENGTH)
    for name, lines, sides in (("pairs", train, {"moe": side}), ("held_out", held_out, {})):
        text = out / f"{name}.jsonl"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(lines) + "\n", encoding="utf-8")
        folder = out / "data" / name
        prepare([text], tokenizer, folder, max_length=MAX_LENGTH, on_long="truncate", sides=sides)
        text.unlink()


def record_expected(
    out: Path, worlds: Iterable[int], words: Sequence[str], *, steps: Sequence[str] = ()
) -> None:
    """Record what runs give here, by the plain forms: dense attention, the head by autograd.

    Args:
        out: assets with data.
        worlds: numbers of ranks whose figures are wanted.
        words: of the quickstart's run.
        steps: words that shorten the two runs whose gradients are recorded.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Place(device="cpu", assets=out.resolve(), scratch=Path(folder))
        for world in worlds:  # first, while this process has no threads that its forks would miss
            _record(out, f"ranks{world}", "cross", place, world, *LAYOUTS[world], f"steps={RANK_STEPS}")
        for name in ("cross", "shared"):
            _record(out, name, name, place, 0, *steps)
        score = quickstart(place, *words)["nll_per_byte"]
    expected = {"words": list(words), "nll_per_byte": score}
    (out / "expected/quickstart.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


def _record(out: Path, name: str, run: str, place: Place, world: int, *words: str) -> None:
    """Record a run, with the first seed that keeps its routers' scores apart; 0 ranks: in this process."""
    for seed in SEEDS:
        chosen = [*words, f"seed={seed}"]
        if world:
            found = run_world(place, world, [*PLAIN, *chosen])
        else:
            recipe, _ = load_run(run, place, *PLAIN, *chosen)
            found = run_ranks(record_steps, (recipe,), 1, "cpu")
        objective, gap = found["steps"][0]["objective"], found["router_gap"]
        print(f"{name}: seed {seed}, objective {objective:.6f}, smallest router gap {gap:.1e}", flush=True)
        if gap >= SMALLEST_GAP:
            write_record(found | {"words": chosen}, out / "expected" / f"{name}.json")
            return
    raise SystemExit(
        f"{name}: with none of the seeds {SEEDS} do the routers' scores stay {SMALLEST_GAP:.0e} apart"
    )


def _copy_pack(pack: Path | None, out: Path) -> None:
    """Copy a pack's parts and its two programs."""
    if pack is None:
        return
    if not (pack / "MANIFEST.json").is_file():
        raise SystemExit(
            f"GPU_PACK={pack}: no MANIFEST.json there; name a pack's folder, or leave GPU_PACK empty"
        )
    (out / "pack").mkdir(parents=True)
    for name in PACK_FILES:
        shutil.copyfile(pack / name, out / "pack" / name)
    shutil.copytree(pack / "parts", out / "pack" / "parts", copy_function=shutil.copyfile)


def _finish(out: Path) -> int:
    """Write what the assets say of themselves; return the bytes of all."""
    facts = {
        "commit": commit_of(),
        "digest": digest_of(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
        "machine": platform.machine(),
        "made": time.strftime("%Y-%m-%d"),
        "seeds": {file.stem: _words(file) for file in sorted((out / "expected").glob("*.json"))},
    }
    (out / FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _words(file: Path) -> list[str]:
    words: list[str] = json.loads(file.read_text(encoding="utf-8"))["words"]
    return words


def main() -> None:
    """Parse and make."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.assets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--pack", type=Path, help="a pack of packages; none: what the machine has must do")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    make_assets(options.out.resolve(), options.pack)


if __name__ == "__main__":
    main()
