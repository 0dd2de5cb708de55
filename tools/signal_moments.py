"""Ask a run to stop at some twenty moments, under three launchers, and see what it does.

    python tools/signal_moments.py                      (every moment, launcher and signal; about 20 minutes)
    python tools/signal_moments.py --signals SIGINT --launchers srun --moments "first step"

At each moment a tiny run on two ranks stands in a library's call that hears no signal: for three seconds, or
for good where a peer is what it waits for. One signal is sent to whoever a user would send it to: our
launcher, torchrun's agent, or all tasks of srun (emulated by its variables). A second one follows when the
first has not ended everything after eight seconds. The table says when the log spoke, when the last process
had ended, with which exit code, and what was lost: steps that were done and not saved, or a run folder that a
run without a step left behind.

Processes are forked from this one, which has imported everything; so torchrun's agent is that of its Python
interface. Exit code 1 if a word took longer than a second, an end after the second signal longer than five,
or anything was lost that the first signal should have saved.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from tide_megatron.platform import prepare_platform

import torch
from torch._C._distributed_c10d import HashStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kill_test import descendants, last_step
from tests.tiny_run import write_tiny_run
from tide_megatron import commands
from tide_megatron.checkpoint.retention import Mark, listed
from tide_megatron.launch import supervisor
from tide_megatron.launch.signals import leave

LAUNCHERS, RANKS = ("tide", "torchrun", "srun"), 2
PAUSE_SECONDS, FOR_GOOD_SECONDS = 3.0, 120.0
PATIENCE_SECONDS, START_SECONDS, END_SECONDS = 8.0, 90.0, 60.0
STEPS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """A call (module:attribute, its how many-eth) at which ranks stand still, or are before a step."""

    where: str
    call: int = 1
    ranks: tuple[int, ...] = (0, 1)
    seconds: float = PAUSE_SECONDS
    goes_on: bool = False
    is_before: bool = True


WAITS: dict[str, Any] = {"ranks": (1,), "seconds": FOR_GOOD_SECONDS}
MOMENTS = {
    "recipe is read": Moment(where="tide_megatron.train.resolve:load_recipe"),
    "device is chosen": Moment(where="tide_megatron.launch.worker:choose_device"),
    "rank 1 never comes": Moment(where="tide_megatron.launch.worker:meet", **WAITS),
    "rank 0 never comes": Moment(where="tide_megatron.launch.worker:meet", **WAITS | {"ranks": (0,)}),
    "groups wait for rank 1": Moment(where="tide_megatron.launch.worker:start_distributed", **WAITS),
    "folder is looked at": Moment(where="tide_megatron.train.folder:check_folder", ranks=(0,)),
    "folder is leased": Moment(where="tide_megatron.train.folder:leased", ranks=(0,)),
    "data is opened": Moment(where="tide_megatron.train.data:open_loader"),
    "student is loaded": Moment(where="tide_megatron.train.setup:build_student"),
    "teacher is loaded": Moment(where="tide_megatron.train.setup:build_teacher"),
    "loading waits for rank 1": Moment(where="tide_megatron.train.setup:build_teacher", **WAITS),
    "teachers are checked": Moment(where="tide_megatron.train.loop:check_teachers"),
    "checkpoint is loaded": Moment(where="tide_megatron.train.saving:load_checkpoint", goes_on=True),
    "beginning waits for rank 1": Moment(where="tide_megatron.train.loop:_begin_together", **WAITS),
    "folder is claimed": Moment(where="tide_megatron.train.loop:claim_folder", ranks=(0,), is_before=False),
    "metrics are opened": Moment(where="tide_megatron.train.loop:_open_metrics", is_before=False),
    "first step": Moment(where="tide_megatron.train.loop:train_step", is_before=False),
    "third step": Moment(where="tide_megatron.train.loop:train_step", call=3, is_before=False),
    "third step waits for rank 1": Moment(
        where="tide_megatron.train.loop:train_step", call=3, is_before=False, **WAITS
    ),
    "evaluation on the way": Moment(where="tide_megatron.train.loop:_evaluate", is_before=False),
    "save begins": Moment(where="tide_megatron.checkpoint.save:Saver.begin", is_before=False),
    "last save is waited for": Moment(
        where="tide_megatron.checkpoint.save:Saver.wait", call=4, is_before=False
    ),
    "evaluation at the end": Moment(where="tide_megatron.train.loop:_evaluate", call=3, is_before=False),
    "student is written": Moment(where="tide_megatron.train.loop:save_model", is_before=False),
}


@dataclasses.dataclass(kw_only=True)
class Row:
    """What one run did: seconds from the first signal to the word, from the last one to the end of all."""

    moment: str
    launcher: str
    number: str
    spoke: float | None = None
    ended: float | None = None
    signals: int = 1
    code: int | None = None
    lost: str = ""
    faults: list[str] = dataclasses.field(default_factory=list)


def plant(moment: Moment, folder: Path) -> None:
    """Make this process, and those forked from it, stand still at a moment."""
    module_name, _, path = moment.where.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module_name))
    real, calls = getattr(owner, name), [0]

    @functools.wraps(real)
    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
        if calls[0] == moment.call and rank in moment.ranks:
            (folder / f"at-{rank}").touch()
            with contextlib.suppress(RuntimeError):  # it waits in vain
                HashStore().wait(["never"], datetime.timedelta(seconds=moment.seconds))
        return real(*args, **options)

    setattr(owner, name, call)


def command(recipe: Path, run: Path, num_ranks: int = RANKS) -> None:
    """Be `tide train`."""
    words = [f"folder={run}", f"steps={STEPS}", "evaluation.every=2", "checkpoints.every=2"]
    sys.argv = ["tide", "train", str(recipe), *words]
    if "RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
        sys.argv += ["--ranks", str(num_ranks)]
    commands.main()


def under_tide(recipe: Path, run: Path, port: int) -> None:
    """Be our launcher; its ranks are forks of it and not of a fresh server."""
    supervisor.start_method = lambda _: multiprocessing.get_context("fork")  # type: ignore[assignment, return-value]
    command(recipe, run)


def under_torchrun(recipe: Path, run: Path, port: int) -> None:
    """Be torchrun's agent."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        run_id="none",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.1,
    )
    elastic_launch(config, under_agent)(recipe, run)


def under_agent(recipe: Path, run: Path) -> None:
    """Be a rank of that agent, and end as a program does: a function that returns waits for its agent."""
    try:
        command(recipe, run)
    except SystemExit as end:
        leave(int(end.code or 0))


def under_srun(recipe: Path, run: Path, port: int, rank: int = 0) -> None:
    """Be a task of srun."""
    given = {"PROCID": rank, "LOCALID": rank, "NTASKS": RANKS, "STEP_ID": 0, "JOB_ID": 1, "NNODES": 1}
    os.environ.update({f"SLURM_{name}": str(value) for name, value in given.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command(recipe, run)


def fork(work: Callable[[], object], log: Path) -> int:
    """Run a function in a forked process that leads a session; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def start(launcher: str, moment: Moment, folder: Path, recipe: Path) -> list[int]:
    """Start a run that stands still at a moment; return the processes to signal."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def life(be: Callable[..., None], *more: int) -> Callable[[], None]:
        def work() -> None:
            plant(moment, folder)
            be(recipe, folder / "run", port, *more)

        return work

    log = folder / "log"
    if launcher == "srun":
        return [fork(life(under_srun, rank), log) for rank in range(RANKS)]
    return [fork(life(under_tide if launcher == "tide" else under_torchrun), log)]


def ask(name: str, launcher: str, number: signal.Signals, place: Path, recipe: Path, saved: Path) -> Row:
    """Let one run come to a moment, ask it to stop, and look."""
    moment, row = MOMENTS[name], Row(moment=name, launcher=launcher, number=number.name)
    folder = place / f"{len(list(place.iterdir()))}"
    folder.mkdir()
    if moment.goes_on:
        shutil.copytree(saved, folder / "run")
    before = _files(folder / "run")
    tops = start(launcher, moment, folder, recipe)
    in_parent = launcher == "tide" and moment.where.endswith(":load_recipe")
    wanted = [folder / f"at-{rank}" for rank in ((0,) if in_parent else moment.ranks)]
    everybody: set[int] = set()
    try:
        if not _within(START_SECONDS, lambda: all(file.exists() for file in wanted)):
            row.faults.append("it never came there")
            return row
        time.sleep(0.3)  # until the others stand where they wait
        everybody = {*tops, *(pid for top in tops for pid in descendants(top))}
        _signal_and_look(row, tops, everybody, number, folder / "log")
        row.lost = _lost(row, moment, folder / "run", before)
    finally:
        for pid in everybody | set(tops):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in tops:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    if row.faults:
        shutil.copy(folder / "log", place.parent / f"{name} {launcher} {number.name}.log")
    return row


def _signal_and_look(
    row: Row, tops: list[int], everybody: set[int], number: signal.Signals, log: Path
) -> None:
    """Send one signal, a second one where that is needed, and measure."""
    codes: dict[int, int] = {}

    def send() -> float:
        for pid in tops:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return time.monotonic()

    def has_ended() -> bool:
        for pid in tops:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                codes.update({pid: os.waitstatus_to_exitcode(status)} if done else {})
        return len(codes) == len(tops) and not any(map(_runs, everybody - set(tops)))

    began = send()
    if _within(PATIENCE_SECONDS, lambda: "heard: " in log.read_text()):
        row.spoke = time.monotonic() - began
    if row.spoke is None or row.spoke > 1:
        row.faults.append("the log was late")
    if not _within(PATIENCE_SECONDS - (time.monotonic() - began), has_ended):
        began, row.signals = send(), 2
        if not _within(END_SECONDS, has_ended):
            row.faults.append("it did not end")
            return
    row.ended = time.monotonic() - began
    row.code = max(codes.values(), key=abs)
    if row.signals == 2 and row.ended > 5:
        row.faults.append("the end was late")


def _files(folder: Path) -> dict[str, int]:
    """Return when every file of a folder was written last."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def _lost(row: Row, moment: Moment, run: Path, before: dict[str, int]) -> str:
    """Say what a run that ended has lost; note as a fault what it should not have."""
    if moment.is_before:
        after = _files(run)
        if after == before and run.exists() == moment.goes_on:
            return "nothing"
        row.faults.append("the run folder is not as it was")
        return f"changed: {', '.join(sorted(str(path) for path, _ in after.items() ^ before.items()))}"
    saved = max((Mark.of(path).step for path in listed(run / "checkpoints")), default=0)
    lost = max(0, last_step(run)) - saved
    if lost and row.signals == 1:
        row.faults.append("steps were lost")
    if row.signals == 1 and not ((run / "stopped.json").exists() or (run / "result.json").exists()):
        row.faults.append("no word in the run folder")
    return f"{lost} steps" if lost else "nothing"


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def make_saved(place: Path, recipe: Path) -> Path:
    """Return a run folder that holds two steps of a run that was stopped."""
    folder = place / "saved"
    folder.mkdir()

    def work() -> None:
        plant(MOMENTS["third step"], folder)
        command(recipe, folder / "run", 1)

    pid = fork(work, folder / "log")
    assert _within(START_SECONDS, (folder / "at-0").exists), (folder / "log").read_text()
    os.kill(pid, signal.SIGINT)
    os.waitpid(pid, 0)
    return folder / "run"


def printed(rows: list[Row]) -> str:
    lines = ["| moment | launcher | signal | spoke | ended | after | exit code | lost | |", "|" + "---|" * 9]
    for row in rows:
        spoke, ended = (f"{number:.2f} s" if number is not None else "-" for number in (row.spoke, row.ended))
        after = "the first" if row.signals == 1 else "the second"
        cells = [row.moment, row.launcher, row.number, spoke, ended, after, str(row.code), row.lost]
        lines.append(f"| {' | '.join([*cells, '; '.join(row.faults)])} |")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moments", nargs="*", default=list(MOMENTS), choices=list(MOMENTS))
    parser.add_argument("--launchers", nargs="*", default=LAUNCHERS, choices=LAUNCHERS)
    parser.add_argument("--signals", nargs="*", default=("SIGINT", "SIGTERM"))
    parser.add_argument("--out", type=Path, help="also write the rows there, one JSON object a line")
    options = parser.parse_args()
    assert prepare_platform().redirected_to_cpu, "it is made for a CPU"
    for name in ("tide_megatron.api", "tide_megatron.launch.ranks", "tide_megatron.train.loop"):
        importlib.import_module(name)  # before anything is forked
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", COLUMNS="200", PYTHONWARNINGS="ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        pid = fork(
            lambda: write_tiny_run(place / "tiny") and None, place / "log"
        )  # torch's threads stay there
        os.waitpid(pid, 0)
        recipe = place / "tiny/run.yaml"
        saved = make_saved(place, recipe)
        (place / "cases").mkdir()
        for name in options.moments:
            for launcher in options.launchers:
                for number in options.signals:
                    row = ask(name, launcher, signal.Signals[number], place / "cases", recipe, saved)
                    rows.append(row)
                    print(printed([row]).splitlines()[-1], file=sys.stderr, flush=True)
                    if options.out:
                        with options.out.open("a") as file:
                            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        for log in place.glob("*.log"):
            print(f"--- {log.name}\n{log.read_text()}", file=sys.stderr)
    print(printed(rows))
    sys.exit(int(any(row.faults for row in rows)))


if __name__ == "__main__":
    main()
