"""The example array that prepares data, in a real SLURM: a task is stopped and goes on."""

import json
import re
from pathlib import Path

import pytest

from tests.slurm.cluster import why_not
from tide_megatron import api
from tide_megatron.base.files import digest_of

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

STUDENT = Path("examples/quickstart/models/student")
CHATS = 30_000
"""Tasks must still work when one of them is stopped."""


def test_an_array_whose_task_was_stopped_gives_what_one_process_gives(cluster, tmp_path):
    chats, out = tmp_path / "chats.jsonl", tmp_path / "data"
    chats.write_text("".join(f"{json.dumps(chat(number))}\n" for number in range(CHATS)))
    log = f"--output={tmp_path}/%a.log"
    words = (str(chats), "--tokenizer", str(STUDENT), "--max-length", "256", "--on-long", "truncate")
    said = cluster.run(
        *("sbatch", "--array=1-4", "--cpus-per-task=1", "--time=20", log),
        *("examples/slurm/prepare.sbatch", str(out), *words),
    )
    [job] = re.findall(r"\d+$", said)
    logs = {part: tmp_path / f"{part}.log" for part in range(1, 5)}
    cluster.within(120, lambda: len(list(tmp_path.glob("data.parts/.2-of-4.*"))) > 0, lambda: told(logs))
    cluster.run("scancel", "--batch", "--signal=TERM", f"{job}_2")
    cluster.within(60, lambda: "Restarts=1" in facts(cluster, f"{job}_2"), lambda: told(logs))
    for part, path in logs.items():
        ended = cluster.wait_for(f"{job}_{part}", 240, path)
        assert ended == "COMPLETED 0:0", told(logs)
    api.prepare(tmp_path / "alone", [chats], tokenizer=STUDENT, max_length=256, on_long="truncate", workers=1)
    assert digests(out) == digests(tmp_path / "alone"), told(logs)


def chat(number):
    words = " ".join(str(number * factor % 9973) for factor in range(1, 40))
    return {
        "messages": [
            {"role": "user", "content": f"Add {number} to each of {words}"},
            {"role": "assistant", "content": " ".join(str(int(word) + number) for word in words.split())},
        ]
    }


def facts(cluster, job):
    return cluster.run("scontrol", "show", "job", job)


def told(logs):
    return "\n".join(f"{part}: {path.read_text()}" for part, path in logs.items() if path.is_file())


def digests(folder):
    """Return the digests of a data folder's files; the manifest says how it was made, too."""
    return {
        path.name: digest_of(path) for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".idx")
    }
