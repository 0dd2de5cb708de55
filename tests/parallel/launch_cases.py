"""Rank functions for test_launch.py, and a command over `run_ranks` for tests that need another process.

python -m tests.parallel.launch_cases FUNCTION RANKS FOLDER (with NNODES set: ranks of one of the nodes)
"""

import ctypes
import ipaddress
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from tide_megatron.platform import prepare_platform

import torch
import torch.distributed as dist

from tide_megatron.base.errors import ConfigError, DataError, RanksFailed, TideError
from tide_megatron.base.heartbeat import HEARTBEAT
from tide_megatron.base.phases import Phases
from tide_megatron.launch import flight_recorder, watchdog
from tide_megatron.launch.nodes import LISTEN_SECONDS
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.parallel.collectives import barrier
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.vocab_group import make_across, make_vocab_group


def add_ranks(folder, *, device, stop):
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return {"sum": float(total), "world": dist.get_world_size(), "threads": torch.get_num_threads()}


def who_listens(folder, *, device, stop):
    """Return the addresses at which anything listens on this machine, once groups are made and used."""
    pair = dist.new_group([0, 1])
    dist.all_reduce(torch.zeros(1), group=pair)
    barrier()
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            place, state = line.split()[1], line.split()[3]
            if state == "0A":
                words = bytes.fromhex(place.partition(":")[0])
                found.add(str(ipaddress.ip_address(words[::-1] if table == "tcp" else words)))
    barrier()
    return sorted(found)


def one_bad_file(folder, *, device, stop):
    if dist.get_rank() == 1:
        raise DataError("data/train.jsonl line 7: no reply; remove the record")
    dist.all_reduce(torch.zeros(1))
    time.sleep(60)


def what_is_visible(folder, *, device, stop):
    """Tell which process this is, and what it saw of GPUs before Python was loaded and afterwards."""
    started_with = Path("/proc/self/environ").read_bytes().split(b"\0")
    return {
        **add_ranks(folder, device=device, stop=stop),
        "process": os.getpid(),
        "hidden at start": b"CUDA_VISIBLE_DEVICES=" in started_with,
        "hidden": os.environ.get("CUDA_VISIBLE_DEVICES") == "",
        "prepared for the CPU": prepare_platform().redirected_to_cpu,
    }


def group_timeouts(folder, *, device, stop):
    """Make groups of all kinds; return how long each of this process waits, megatron-core's included."""
    make_vocab_group([100], 2)
    make_groups(Layout(tensor=2, pipeline=2))
    make_across(Layout(), 2)
    known = list(dist.distributed_c10d._world.pg_map)
    waits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in known]
    return sorted({group.size() for group in known}), len(known), waits


def wait_in_vain(folder, *, device, stop):
    """Let rank 1 stay away from a collective of its pair; rank 0 tells how long it waited for it."""
    pair = make_groups(Layout(tensor=2)).tp
    dist.all_reduce(torch.zeros(1), group=pair)
    if dist.get_rank() == 1:
        time.sleep(60)
    start = time.monotonic()
    try:
        dist.all_reduce(torch.zeros(1), group=pair)
    except RuntimeError:
        (Path(folder) / f"waited-{dist.get_rank()}").write_text(str(time.monotonic() - start))
        raise


def add_then_fail(folder, *, device, stop):
    # One write: torchrun's ranks share an unbuffered stdout, and pieces would mix.
    print(f"together {add_ranks(folder, device=device, stop=stop)}\n", end="", flush=True)
    one_bad_file(folder, device=device, stop=stop)


def one_bad_file_others_deaf(folder, *, device, stop):
    if dist.get_rank() == 1:
        raise DataError("data/train.jsonl line 7: no reply; remove the record")
    time.sleep(60)


def wrong_world(folder, *, device, stop):
    raise ConfigError(
        f"teachers.big.layout: expert=4 does not fit {dist.get_world_size()} ranks; use expert=2"
    )


def bug(folder, *, device, stop):
    if dist.get_rank() == 1:
        raise ZeroDivisionError("planted bug")
    dist.all_reduce(torch.zeros(1))


def killed(folder, *, device, stop):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


def vanished(folder, *, device, stop):
    if dist.get_rank() == 1:
        os._exit(7)
    dist.all_reduce(torch.zeros(1))


def train_until_stopped(folder, *, device, stop):
    """Step together until all agree to stop; leave a file as a checkpoint would be left.

    The way out takes longer than a launcher takes to hear of a request to another node, and to pass it on.
    """
    rank, steps = dist.get_rank(), 0
    (Path(folder) / f"pid-{rank}").write_text(str(os.getpid()))
    with stop.finishing("it saves", is_last=True):
        while True:
            wanted = torch.tensor(int(stop.requested))
            dist.all_reduce(wanted)
            if wanted:
                break
            steps += 1
            if steps == 3:
                (Path(folder) / f"running-{rank}").touch()
            time.sleep(0.01)
    (Path(folder) / f"saved-{rank}").write_text(f"{stop.reason}")
    time.sleep(2 * LISTEN_SECONDS)
    return steps


def stand_still(folder, how, phase="teacher", *, device, stop):
    """Step three times; in the fourth rank 1 stands still in a phase, and the others wait for it."""
    phases = Phases()
    for step in range(4):
        with phases(phase):
            if step == 3 and dist.get_rank() == 1:
                wait_for_ever(how)
        with phases("exchange"):
            barrier()
        HEARTBEAT.update()


def fall_asleep(folder, *, device, stop):
    stand_still(folder, "asleep", device=device, stop=stop)


def fall_asleep_with_a_mute_recorder(folder, answer_seconds=1.0, *, device, stop):
    """The same, and torch's flight recorder never answers; rank 1's holds the interpreter meanwhile."""
    hold = ctypes.PyDLL(None).sleep if dist.get_rank() == 1 else time.sleep
    flight_recorder.recorder = SimpleNamespace(_dump_fr_trace_json=lambda: hold(600))
    flight_recorder.ANSWER_SECONDS, watchdog.DEAF_SECONDS = answer_seconds, 3 * answer_seconds
    fall_asleep(folder, device=device, stop=stop)


def wait_for_ever(how):
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "holding the interpreter":
        while True:  # a signal ends libc's sleep
            ctypes.PyDLL(None).sleep(600)
    else:
        time.sleep(600)


def finish_slowly(folder, *, device, stop):
    """Take longer than a step may where that is allowed: at the first update, in a save, at the end."""
    phases = Phases()
    with phases("teacher"):
        time.sleep(2.5)
    HEARTBEAT.update()
    with phases("checkpoint"):
        time.sleep(2.5)
    HEARTBEAT.rest()
    time.sleep(6)
    return "finished"


def ignore_the_flag(folder, *, device, stop):
    (Path(folder) / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (Path(folder) / f"child-{dist.get_rank()}").write_text(str(child.pid))
    stop.farewells.append((Path(folder) / f"farewell-{dist.get_rank()}").touch)
    with stop.finishing("it does not"):
        (Path(folder) / f"running-{dist.get_rank()}").touch()
        time.sleep(60)


def main():
    name, num_ranks, folder = sys.argv[1:4]
    grace_seconds = float(sys.argv[4]) if len(sys.argv) > 4 else 60.0
    here = (
        {"ranks_per_node": int(num_ranks)}
        if os.environ.get("NNODES")
        else {"num_ranks": int(num_ranks) or None}
    )
    here["hang_seconds"] = float(os.environ.get("HANG_SECONDS", "0")) or None
    here["grace_seconds"] = grace_seconds
    try:
        print("value", run_ranks(globals()[name], (folder,), device="cpu", **here))
    except TideError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except RanksFailed as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
