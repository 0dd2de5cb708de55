"""Several NCCL ranks on ONE GPU: placement, dtypes, uneven exchanges and hangs; nothing about speed.

NCCL refuses two ranks on one GPU when host hash and bus id agree, so every rank is told another host
(`NCCL_HOSTID`) and they talk over sockets. Every rank is a process that finds its place as under torchrun.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check.recorded import (
    LAYOUTS,
    compare,
    load_run,
    read_expected,
    read_record,
    record_steps,
    write_record,
)
from gpu_check.rows import NotMeasured, Place, Row, fresh_processes, judged
from tide_megatron.launch.ranks import run_ranks

STEPS = 2
"""Of a run on several ranks."""
RANK_SECONDS = 90.0
"""A world that is not done by then hangs."""
ONE_GPU = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}


def check_ranks(place: Place) -> list[Row]:
    """Run the cross-tokenizer case on four ranks; on two, then one, where four do not start."""
    tried = []
    for world in (4, 2, 1):
        try:
            found = run_world(place, world, read_expected(place, f"ranks{world}")["words"])
        except NotMeasured as fault:
            tried.append(str(fault))
            continue
        return [_row(place, world, found, tried)]
    return [Row(check="ranks", verdict="failed", text="; ".join(tried))]


def _row(place: Place, world: int, found: dict[str, Any], tried: list[str]) -> Row:
    figures, faults = compare(found, read_expected(place, f"ranks{world}"))
    backend = "NCCL on one GPU" if place.device == "cuda" else "gloo"
    words = [word.removeprefix("teachers.").replace(".layout.", " ") for word in LAYOUTS[world]]
    text = (
        f"{world} rank(s) over {backend} ({', '.join(words) or 'uncut'}): first losses "
        f"{figures['first_loss']:.1e} and gradients {figures['gradient']:.1e} from gloo's on a CPU"
    )
    return judged("ranks", text, [*tried, *faults], world=world, **figures)


def run_world(place: Place, world: int, words: Sequence[str]) -> dict[str, Any]:
    """Start ranks on the cross-tokenizer run, changed by words, and return what rank 0 recorded.

    Raises:
        NotMeasured: a rank failed, or the world hangs; with the end of the first failing rank's log.
    """
    folder = place.scratch / f"world{world}"
    shutil.rmtree(folder, ignore_errors=True)  # of another seed
    folder.mkdir()
    context = fresh_processes(place)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=work_rank, args=(place, folder, rank, (world, port), words))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + RANK_SECONDS
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode for rank in ranks):
            deadline = min(deadline, time.monotonic() + 5.0)  # the others may still say something
        time.sleep(0.1)
    late = [number for number, rank in enumerate(ranks) if rank.is_alive()]
    failed = [number for number, rank in enumerate(ranks) if rank.exitcode]
    for rank in ranks:
        if rank.pid is not None and rank.is_alive():
            os.kill(rank.pid, signal.SIGKILL)
        rank.join()
    if failed or late:
        who = (failed or late)[0]
        lines = (folder / f"rank{who}.log").read_text(errors="replace").splitlines()
        said = next(
            (line for line in reversed(lines) if "Error" in line or "error" in line),
            lines[-1] if lines else "",
        )
        how = "failed" if failed else f"did not end in {RANK_SECONDS:.0f} s"
        raise NotMeasured(f"{world} ranks: rank {who} {how}: {said.strip()[:300]}")
    return read_record(folder / "record.json")


def work_rank(place: Place, folder: Path, rank: int, where: tuple[int, int], words: Sequence[str]) -> None:
    """Be one rank, in a fresh process, with a log of its own; `where` is number of ranks and port."""
    world, port = where
    log = (folder / f"rank{rank}.log").open("w")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_RANK="0" if place.device == "cuda" else str(rank),
        LOCAL_WORLD_SIZE=str(world),
    )
    if place.device == "cuda":  # each rank is told that it is alone on its machine
        os.environ.update(ONE_GPU, NCCL_HOSTID=f"rank{rank}", LOCAL_WORLD_SIZE="1", OMP_NUM_THREADS="2")
    recipe, _ = load_run("cross", place, *words)
    found = run_ranks(record_steps, (recipe,), None, place.device)
    if rank == 0:
        write_record(found, folder / "record.json")
    sys.stdout.flush()
    os._exit(0)
